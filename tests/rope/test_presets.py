"""RoPE presets against formulas written out here in float64, transformers' own frequency functions,
and the rotary buffers of whole tiny models."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rope_families import (
    FAMILIES,
    GEMMA3,
    ORIGINAL,
    TARGET,
    TINY,
    buffer_of,
    build,
    lists,
    options_for,
    rotary_of,
    tiny,
)
from transformers import (
    AutoConfig,
    DeepseekV3Config,
    FalconConfig,
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    Phi3Config,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from longlora_plugin import registry
from longlora_plugin.hookspecs import hookimpl
from longlora_plugin.rope import (
    PRESETS,
    apply_rope,
    base_context_of,
    has_rope,
    pretrained_context_of,
    resolve_rope,
    rope_parameters_of,
)

LLAMA31 = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
LLAMA32 = {**LLAMA31, "rope_scaling": {**LLAMA31["rope_scaling"], "factor": 32.0}}
LLAMA2 = {"hidden_size": 4096, "num_attention_heads": 32, "max_position_embeddings": 4096}
LLAMA2["rope_theta"] = 10000.0
QWEN25 = {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "num_attention_heads": 28,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
}
QWEN25_YARN = {
    **QWEN25,
    "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
}


# ---- the oracle: frequencies [rotary_dim / 2] in float64 ------------------------------------


def plain(theta, dim):
    return np.float64(theta) ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)


def linear_frequencies(theta, dim, factor):
    return plain(theta, dim) / factor


def ntk_frequencies(theta, dim, stretch):
    return plain(theta * stretch ** (dim / (dim - 2)), dim)


def dynamic_frequencies(theta, dim, factor, length, original):
    grown = factor * max(length, original) / original - (factor - 1)
    return plain(theta * grown ** (dim / (dim - 2)), dim)


def yarn_frequencies(theta, dim, factor, original, fast=32.0, slow=1.0, truncate=True):
    def pair_turning(rotations):
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_turning(fast), pair_turning(slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high += 0.001 if low == high else 0
    divided = np.clip((np.arange(dim // 2, dtype=np.float64) - low) / (high - low), 0, 1)
    return plain(theta, dim) * (divided / factor + 1 - divided)


def llama3_frequencies(theta, dim, factor, original, low=1.0, high=4.0):
    frequencies = plain(theta, dim)
    rotations = original * frequencies / (2 * math.pi)
    kept = np.clip((rotations - low) / (high - low), 0, 1)
    return frequencies * (kept + (1 - kept) / factor)


def longrope_frequencies(theta, dim, divisors):
    return plain(theta, dim) / np.asarray(divisors, dtype=np.float64)


def expected_frequencies(preset, theta, dim):
    """At rest: of a model that has not seen a sequence beyond the original context."""
    return {
        "linear": lambda: linear_frequencies(theta, dim, 4),
        "dynamic": lambda: plain(theta, dim),
        "ntk": lambda: ntk_frequencies(theta, dim, 4),
        "theta": lambda: plain(2e7, dim),
        "yarn": lambda: yarn_frequencies(theta, dim, 4, ORIGINAL),
        "llama3": lambda: llama3_frequencies(theta, dim, 4, ORIGINAL),
        "longrope": lambda: longrope_frequencies(theta, dim, lists(dim)["short_factor"]),
        "none": lambda: plain(theta, dim),
    }[preset]()


# ---- whole models ---------------------------------------------------------------------------

TAKES_ANY = [name for name in FAMILIES if name != "phi3"]
SHORT_CASES = [
    *((family, preset) for family in TAKES_ANY for preset in PRESETS if preset != "pi"),
    *(("phi3", preset) for preset in ("ntk", "theta", "longrope", "none")),
]


@pytest.mark.parametrize(("family", "preset"), SHORT_CASES)
def test_buffers_of_a_model_built_from_the_settings_are_the_papers_frequencies(
    family, preset, tmp_path
):
    make, theta, dim, layer_type = FAMILIES[family]
    config = make()
    resolved = resolve_rope(preset, config, TARGET, **options_for(preset, dim))
    apply_rope(config, resolved)
    model = build(config)
    expected = expected_frequencies(preset, theta, dim)
    np.testing.assert_allclose(buffer_of(model, layer_type), expected, rtol=2e-6)
    if layer_type:
        np.testing.assert_allclose(buffer_of(model, "sliding_attention"), plain(1e4, dim), 2e-6)

    config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["rope_parameters"] == resolved.rope_parameters
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert rope_parameters_of(loaded) == resolved.rope_parameters
    assert loaded.max_position_embeddings == resolved.max_position_embeddings
    again = buffer_of(build(loaded), layer_type)
    np.testing.assert_array_equal(again, buffer_of(model, layer_type))


@pytest.mark.parametrize(("family", "preset"), SHORT_CASES)
def test_transformers_own_function_gives_the_same_frequencies(family, preset):
    make, theta, dim, layer_type = FAMILIES[family]
    config = make()
    resolved = resolve_rope(preset, config, TARGET, **options_for(preset, dim))
    config.rope_parameters = copy.deepcopy(resolved.rope_parameters)
    config.max_position_embeddings = resolved.max_position_embeddings
    parameters = resolved.rope_parameters
    layer = parameters[layer_type] if layer_type else parameters
    if layer["rope_type"] == "default":
        assert preset in ("ntk", "theta", "none")
        found = plain(layer["rope_theta"], dim)
    else:
        function = ROPE_INIT_FUNCTIONS[layer["rope_type"]]
        found = function(config, "cpu", layer_type=layer_type)[0].double().numpy()
    expected = expected_frequencies(preset, theta, dim)
    np.testing.assert_allclose(found, expected, rtol=2e-6)


@pytest.mark.parametrize("family", TAKES_ANY)
def test_dynamic_scales_a_whole_model_beyond_the_original_context_only(family):
    make, theta, dim, layer_type = FAMILIES[family]
    config = make()
    resolved = resolve_rope("dynamic", config, TARGET)
    assert resolved.max_position_embeddings == ORIGINAL
    apply_rope(config, resolved)
    model = build(config)
    with torch.no_grad():
        model(torch.zeros(1, ORIGINAL, dtype=torch.long))
        np.testing.assert_allclose(buffer_of(model, layer_type), plain(theta, dim), rtol=2e-6)
        model(torch.zeros(1, 300, dtype=torch.long))
        expected = dynamic_frequencies(theta, dim, 4, 300, ORIGINAL)
        np.testing.assert_allclose(buffer_of(model, layer_type), expected, rtol=2e-6)
        model(torch.zeros(1, TARGET, dtype=torch.long))
    expected = dynamic_frequencies(theta, dim, 4, TARGET, ORIGINAL)
    np.testing.assert_allclose(buffer_of(model, layer_type), expected, rtol=2e-6)


def test_dynamic_is_back_when_settings_are_applied_after_a_host_raised_the_maximum():
    config = tiny(LlamaConfig)
    resolved = resolve_rope("dynamic", config, TARGET)
    apply_rope(config, resolved)
    model = build(config)
    model.config.max_position_embeddings = TARGET  # as Axolotl's model loader does
    with torch.no_grad():
        model(torch.zeros(1, 300, dtype=torch.long))
        np.testing.assert_allclose(buffer_of(model), plain(1e4, 32), rtol=2e-6)
        apply_rope(model.config, resolved)
        model(torch.zeros(1, TARGET, dtype=torch.long))
    expected = dynamic_frequencies(1e4, 32, 4, TARGET, ORIGINAL)
    np.testing.assert_allclose(buffer_of(model), expected, rtol=2e-6)


@pytest.mark.parametrize("family", ["llama", "phi", "phi3"])
def test_longrope_uses_the_long_list_beyond_the_original_context(family):
    make, theta, dim, _ = FAMILIES[family]
    config = make()
    apply_rope(config, resolve_rope("longrope", config, TARGET, **lists(dim)))
    model = build(config)
    with torch.no_grad():
        model(torch.zeros(1, ORIGINAL + 1, dtype=torch.long))
    expected = longrope_frequencies(theta, dim, lists(dim)["long_factor"])
    np.testing.assert_allclose(buffer_of(model), expected, rtol=2e-6)
    scaling = math.sqrt(1 + math.log(4) / math.log(ORIGINAL))
    assert rotary_of(model).attention_scaling == pytest.approx(scaling)


@pytest.mark.parametrize("options", [{}, {"attention_factor": 1.5}])
def test_yarn_sharpens_the_logits_of_a_whole_model_as_the_paper_says(options):
    config = tiny(LlamaConfig)
    apply_rope(config, resolve_rope("yarn", config, TARGET, **options))
    expected = options.get("attention_factor", 0.1 * math.log(4) + 1)
    assert rotary_of(build(config)).attention_scaling == pytest.approx(expected)


def test_yarn_options_reach_the_buffers():
    config = tiny(LlamaConfig)
    options = {"beta_fast": 16, "beta_slow": 2, "truncate": False, "factor": 8}
    apply_rope(config, resolve_rope("yarn", config, TARGET, **options))
    expected = yarn_frequencies(1e4, 32, 8, ORIGINAL, 16, 2, truncate=False)
    np.testing.assert_allclose(buffer_of(build(config)), expected, rtol=2e-6)


def test_the_text_config_of_a_multimodal_model_is_extended():
    text = {**TINY, **GEMMA3, "max_position_embeddings": ORIGINAL}
    config = Gemma3Config(text_config=text)
    apply_rope(config, resolve_rope("linear", config, TARGET))
    assert config.text_config.rope_parameters["full_attention"]["factor"] == 4
    assert config.text_config.rope_parameters["sliding_attention"]["rope_type"] == "default"
    assert config.text_config.max_position_embeddings == TARGET


# ---- numbers from papers --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "factor"), [(8192, 2), (16384, 4), (32768, 8), (65536, 16), (100_000, 25)]
)
@pytest.mark.parametrize("name", ["linear", "pi"])
def test_linear_has_longloras_factor_for_llama2(name, target, factor):
    resolved = resolve_rope(name, LLAMA2, target)
    assert resolved.rope_parameters == {
        "rope_type": "linear",
        "rope_theta": 10000.0,
        "factor": factor,
    }
    assert resolved.max_position_embeddings == target


@pytest.mark.parametrize(
    ("base", "target", "factor"),
    [(LLAMA2, 65536, 16), (LLAMA2, 131072, 32), (QWEN25, 131072, 4)],
)
def test_yarn_has_the_published_scale(base, target, factor):
    parameters = resolve_rope("yarn", base, target).rope_parameters
    assert parameters["factor"] == factor
    assert parameters["original_max_position_embeddings"] == base["max_position_embeddings"]
    assert (parameters["beta_fast"], parameters["beta_slow"]) == (32, 1)


def test_llama3_with_factor_8_on_llama_3_gives_the_published_parameters_of_llama_3_1():
    llama_3 = {**LLAMA31, "max_position_embeddings": 8192, "rope_scaling": None}
    parameters = resolve_rope("llama3", llama_3, 65536).rope_parameters
    assert parameters == {**LLAMA31["rope_scaling"], "rope_theta": 500000.0}


def test_ntk_divides_the_lowest_frequency_by_the_stretch_and_keeps_the_highest():
    parameters = resolve_rope("ntk", LLAMA2, 32768).rope_parameters
    assert parameters["rope_theta"] == pytest.approx(10000 * 8 ** (128 / 126))
    found, base = plain(parameters["rope_theta"], 128), plain(1e4, 128)
    assert base[-1] / found[-1] == pytest.approx(8)
    assert found[0] == base[0]


@pytest.mark.parametrize("option", ["theta", "base", "rope_theta"])
def test_theta_sets_the_explicit_base_code_llama_used(option):
    resolved = resolve_rope("theta", LLAMA2, 16384, **{option: 1_000_000})
    assert resolved.rope_parameters == {"rope_type": "default", "rope_theta": 1e6}


# ---- base models that are scaled already ----------------------------------------------------


def test_contexts_of_scaled_models():
    assert (pretrained_context_of(LLAMA31), base_context_of(LLAMA31)) == (8192, 131072)
    assert (pretrained_context_of(LLAMA2), base_context_of(LLAMA2)) == (4096, 4096)
    assert (pretrained_context_of(QWEN25_YARN), base_context_of(QWEN25_YARN)) == (32768, 131072)
    coder = {**LLAMA2, "max_position_embeddings": 16384}
    coder["rope_scaling"] = {"type": "linear", "factor": 4.0}
    assert (pretrained_context_of(coder), base_context_of(coder)) == (4096, 16384)


def test_llama_3_1_to_256k_keeps_its_own_scaling_and_raises_the_factor():
    resolved = resolve_rope("llama3", LLAMA31, 262144)
    assert resolved.rope_parameters == {
        **LLAMA31["rope_scaling"],
        "rope_theta": 500000.0,
        "factor": 32.0,
    }
    assert resolved.max_position_embeddings == 262144
    assert (resolved.pretrained_context, resolved.base_context) == (8192, 131072)
    before = llama3_frequencies(5e5, 128, 8, 8192)
    after = llama3_frequencies(5e5, 128, resolved.rope_parameters["factor"], 8192)
    assert 262144 * after[-1] <= 131072 * before[-1]
    np.testing.assert_array_equal(after[:20], before[:20])


def test_llama_3_2_whose_factor_is_above_the_ratio_is_still_stretched():
    assert resolve_rope("llama3", LLAMA32, 262144).rope_parameters["factor"] == 64


def test_llama_3_1_takes_a_smaller_explicit_factor_that_covers_the_stretch():
    assert resolve_rope("llama3", LLAMA31, 262144, factor=16).rope_parameters["factor"] == 16
    with pytest.raises(ValueError, match="write factor: 16"):
        resolve_rope("llama3", LLAMA31, 262144, factor=15)


@pytest.mark.parametrize("preset", ["linear", "yarn", "dynamic", "longrope"])
def test_another_scaling_on_llama_3_1_is_refused_and_says_what_to_write(preset):
    options = lists(128) if preset == "longrope" else {}
    with pytest.raises(ValueError, match=r"rope: llama3 to extend.*replace: true"):
        resolve_rope(preset, LLAMA31, 262144, **options)


def test_replace_drops_the_scaling_of_llama_3_1_and_starts_from_its_pretraining():
    resolved = resolve_rope("yarn", LLAMA31, 1048576, replace=True)
    assert resolved.rope_parameters == {
        "rope_type": "yarn",
        "rope_theta": 500000.0,
        "factor": 128.0,
        "original_max_position_embeddings": 8192,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
    }
    assert resolve_rope("linear", LLAMA31, 262144, replace=True).rope_parameters["factor"] == 32


@pytest.mark.parametrize(("preset", "exponent"), [("ntk", 128 / 126), ("theta", None)])
def test_a_preset_about_theta_keeps_the_scaling_of_llama_3_1(preset, exponent):
    options = {"theta": 8e6} if exponent is None else {}
    parameters = resolve_rope(preset, LLAMA31, 262144, **options).rope_parameters
    wanted = 8e6 if exponent is None else 5e5 * 2**exponent
    assert parameters == {**LLAMA31["rope_scaling"], "rope_theta": pytest.approx(wanted)}


@pytest.mark.parametrize("preset", [name for name in PRESETS if name not in ("theta", "longrope")])
@pytest.mark.parametrize("target", [4096, 65536, 131072])
def test_a_target_that_llama_3_1_supports_changes_nothing(preset, target):
    resolved = resolve_rope(preset, LLAMA31, target)
    assert not resolved.extended
    assert resolved.factor == 1
    assert resolved.rope_parameters == rope_parameters_of(LLAMA31)
    assert resolved.max_position_embeddings == 131072


def test_qwen_with_yarn_is_extended_from_what_yarn_gives_it():
    assert not resolve_rope("yarn", QWEN25_YARN, 131072).extended
    longer = resolve_rope("yarn", QWEN25_YARN, 262144).rope_parameters
    assert (longer["factor"], longer["original_max_position_embeddings"]) == (8, 32768)


def test_deepseeks_yarn_settings_survive_an_extension():
    own = {
        "type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 4096,
        "beta_fast": 24,
        "beta_slow": 2,
        "mscale": 1.0,
        "mscale_all_dim": 0.7,
    }
    base = DeepseekV3Config(rope_scaling=dict(own), max_position_embeddings=163840)
    parameters = resolve_rope("yarn", base, 327680).rope_parameters
    assert parameters["factor"] == 80
    for key in ("original_max_position_embeddings", "beta_fast", "beta_slow", "mscale_all_dim"):
        assert parameters[key] == own[key]


def test_linear_on_a_linear_base_multiplies_the_factor():
    base = LlamaConfig(
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
    )
    assert resolve_rope("linear", base, 16384).rope_parameters["factor"] == 4
    assert resolve_rope("linear", base, 12288).rope_parameters["factor"] == 3
    assert resolve_rope("linear", base, 8193).rope_parameters["factor"] == 3
    thirds = {**LLAMA2, "max_position_embeddings": 10000}
    thirds["rope_scaling"] = {"type": "linear", "factor": 3.0}
    assert resolve_rope("linear", thirds, 20000).rope_parameters["factor"] == 6


def test_original_context_tells_a_linear_base_that_kept_its_unscaled_maximum():
    longchat = {**LLAMA2, "rope_scaling": {"type": "linear", "factor": 4.0}}
    kept = resolve_rope("linear", longchat, 16384, original_context=4096)
    assert (kept.extended, kept.max_position_embeddings) == (False, 16384)
    longer = resolve_rope("linear", longchat, 32768, original_context=4096)
    assert (longer.rope_parameters["factor"], longer.max_position_embeddings) == (8, 32768)


def test_extending_twice_is_extending_once():
    for preset in ("linear", "yarn", "llama3", "ntk"):
        config = tiny(LlamaConfig)
        for target in (256, 512):
            apply_rope(config, resolve_rope(preset, config, target))
        once = resolve_rope(preset, tiny(LlamaConfig), 512).rope_parameters
        twice = rope_parameters_of(config)
        assert twice.pop("rope_theta") == pytest.approx(once.pop("rope_theta"))
        assert twice == once


def test_a_dynamic_base_keeps_its_maximum_and_gets_a_larger_factor():
    config = tiny(LlamaConfig)
    apply_rope(config, resolve_rope("dynamic", config, 256))
    longer = resolve_rope("dynamic", config, 1024)
    assert (longer.rope_parameters["factor"], longer.max_position_embeddings) == (8, ORIGINAL)
    with pytest.raises(ValueError, match="replace: true"):
        resolve_rope("ntk", config, 1024)


def test_phi_with_longrope_is_extended_by_its_own_long_list():
    own = {"type": "longrope", **lists(16)}
    fields = {"partial_rotary_factor": 0.5, "original_max_position_embeddings": 128}
    config = tiny(Phi3Config, rope_scaling=own, **{**fields, "max_position_embeddings": 512})
    assert (pretrained_context_of(config), base_context_of(config)) == (128, 512)
    assert not resolve_rope("longrope", config, 512).extended
    apply_rope(config, resolve_rope("longrope", config, 1024))
    model = build(config)
    np.testing.assert_allclose(
        buffer_of(model), longrope_frequencies(1e4, 16, lists(16)["short_factor"]), rtol=2e-6
    )
    with torch.no_grad():
        model(torch.zeros(1, 300, dtype=torch.long))
    doubled = [2 * value for value in lists(16)["long_factor"]]
    np.testing.assert_allclose(buffer_of(model), longrope_frequencies(1e4, 16, doubled), rtol=2e-6)
    assert rotary_of(model).attention_scaling == pytest.approx(
        math.sqrt(1 + math.log(8) / math.log(128))
    )


def test_longrope_on_phi3_stores_the_original_where_phi3_reads_it(tmp_path):
    config = tiny(Phi3Config)
    assert config.original_max_position_embeddings == 4096
    apply_rope(config, resolve_rope("longrope", config, TARGET, **lists(32)))
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert loaded.rope_parameters["original_max_position_embeddings"] == ORIGINAL


def test_gemma_3_with_linear_global_layers_is_extended_there_only():
    layers = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    }
    config = tiny(Gemma3TextConfig, rope_parameters=copy.deepcopy(layers), **GEMMA3)
    resolved = resolve_rope("linear", config, 2 * ORIGINAL)
    assert resolved.rope_parameters == {
        **layers,
        "full_attention": {**layers["full_attention"], "factor": 16.0},
    }


def test_options_without_a_factor_keep_the_factor_of_a_base_that_supports_the_target():
    parameters = resolve_rope("llama3", LLAMA31, 4096, low_freq_factor=2).rope_parameters
    assert parameters == {
        **LLAMA31["rope_scaling"],
        "rope_theta": 500000.0,
        "low_freq_factor": 2.0,
    }


def test_a_llama3_base_keeps_its_own_low_and_high():
    scaling = {**LLAMA31["rope_scaling"], "low_freq_factor": 2.0, "high_freq_factor": 8.0}
    parameters = resolve_rope("llama3", {**LLAMA31, "rope_scaling": scaling}, 262144)
    assert parameters.rope_parameters["low_freq_factor"] == 2
    assert parameters.rope_parameters["high_freq_factor"] == 8


def test_replace_scales_from_the_original_context_even_below_the_supported_one():
    resolved = resolve_rope("linear", LLAMA31, 65536, replace=True)
    assert resolved.rope_parameters["factor"] == 8
    assert resolved.max_position_embeddings == 65536


def test_linear_on_gemma_4s_proportional_layers_divides_their_frequencies():
    if "gemma4_text" not in CONFIG_MAPPING:
        pytest.skip("this transformers has no Gemma 4")
    sizes = {**GEMMA3, "global_head_dim": 32, "hidden_size_per_layer_input": 0}
    config = tiny(CONFIG_MAPPING["gemma4_text"], vocab_size_per_layer_input=64, **sizes)
    before = buffer_of(build(copy.deepcopy(config)), "full_attention")
    resolved = resolve_rope("linear", config, TARGET)
    assert resolved.rope_parameters["full_attention"]["rope_type"] == "proportional"
    apply_rope(config, resolved)
    np.testing.assert_allclose(buffer_of(build(config), "full_attention"), before / 4, rtol=2e-6)
    with pytest.raises(ValueError, match="write rope: linear to extend that"):
        resolve_rope("yarn", config, 2 * TARGET)


@pytest.mark.parametrize(("preset", "options"), [("ntk", {}), ("theta", {"theta": 1e6})])
def test_a_theta_that_the_model_type_does_not_read_is_refused(preset, options):
    if "granite_swa" not in CONFIG_MAPPING:
        pytest.skip("this transformers has no Granite SWA")
    config = tiny(CONFIG_MAPPING["granite_swa"])
    assert resolve_rope("linear", config, TARGET).extended
    with pytest.raises(ValueError, match=r"'granite_swa' does not read.*write rope: linear"):
        resolve_rope(preset, config, TARGET, **options)


@pytest.mark.parametrize("form", [dict, lambda fields: Phi3Config(**fields)])
def test_neither_resolving_nor_using_the_result_changes_a_base_with_lists(form):
    scaling = {"type": "longrope", **lists(16)}
    fields = {**TINY, "partial_rotary_factor": 0.5, "max_position_embeddings": 512}
    base = form({**fields, "original_max_position_embeddings": 128, "rope_scaling": scaling})
    before = copy.deepcopy(dict(base) if isinstance(base, dict) else base.to_dict())
    for target in (512, 1024):
        resolved = resolve_rope("longrope", base, target)
        resolved.rope_parameters["short_factor"].append(0.0)
        resolved.rope_parameters["factor"] = 0
    assert (base if isinstance(base, dict) else base.to_dict()) == before


def test_a_typed_mapping_is_not_completed_in_place():
    base = copy.deepcopy(QWEN25_YARN)
    resolve_rope("yarn", base, 262144)
    assert base == QWEN25_YARN


def test_configs_do_not_share_what_is_applied_to_them():
    first, second = tiny(LlamaConfig), tiny(LlamaConfig)
    resolved = resolve_rope("linear", first, TARGET)
    apply_rope(first, resolved)
    apply_rope(second, resolved)
    first.rope_parameters["factor"] = 99.0
    assert second.rope_parameters["factor"] == 4
    assert resolved.rope_parameters["factor"] == 4


def test_the_first_phi_3_configs_are_read_as_longrope():
    scaling = {"type": "su", "short_factor": [1.0], "long_factor": [2.0]}
    phi3 = {**LLAMA2, "max_position_embeddings": 131072, "rope_scaling": scaling}
    phi3["original_max_position_embeddings"] = 4096
    assert (pretrained_context_of(phi3), base_context_of(phi3)) == (4096, 131072)
    parameters = rope_parameters_of(phi3)
    assert (parameters["rope_type"], parameters["factor"]) == ("longrope", 32)


def test_the_text_part_of_a_plain_multimodal_mapping_counts():
    assert pretrained_context_of({"vision_config": {}, "text_config": LLAMA31}) == 8192
    assert base_context_of({"vision_config": {}, "text_config": LLAMA2}) == 4096


def test_model_specific_keys_are_kept():
    base = {**LLAMA2, "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24]}}
    parameters = resolve_rope("yarn", base, 32768).rope_parameters
    assert parameters["mrope_section"] == [16, 24, 24]
    assert parameters["rope_theta"] == 10000.0


# ---- forms of base configs ------------------------------------------------------------------


@pytest.mark.parametrize("form", ["dict", "namespace", "config", "typed dict"])
def test_every_form_of_an_old_config_resolves_alike(form):
    old = {**LLAMA2, "rope_theta": 20000.0}
    base = {
        "dict": lambda: old,
        "namespace": lambda: SimpleNamespace(**old),
        "config": lambda: LlamaConfig(**old),
        "typed dict": lambda: {**old, "model_type": "llama"},
    }[form]()
    resolved = resolve_rope("ntk", base, 8192)
    assert resolved.rope_parameters["rope_theta"] == pytest.approx(20000 * 2 ** (128 / 126))


def test_a_typed_mapping_gets_the_defaults_of_its_config_class():
    neox = {"model_type": "gpt_neox", "rotary_emb_base": 5000, "max_position_embeddings": 2048}
    parameters = rope_parameters_of(neox)
    assert parameters == {
        "rope_type": "default",
        "rope_theta": 5000,
        "partial_rotary_factor": 0.25,
    }
    untyped = {key: value for key, value in neox.items() if key != "model_type"}
    assert rope_parameters_of({**untyped, "rotary_pct": 0.25}) == parameters


def test_only_the_rotary_part_of_a_plain_deepseek_mapping_counts():
    base = {**LLAMA2, "qk_rope_head_dim": 64}
    parameters = resolve_rope("ntk", base, 8192).rope_parameters
    assert parameters["rope_theta"] == pytest.approx(1e4 * 2 ** (64 / 62))


def test_original_context_overrides_the_maximum_of_an_unscaled_base():
    mistral = {**LLAMA2, "max_position_embeddings": 32768}
    assert not resolve_rope("linear", mistral, 32768).extended
    resolved = resolve_rope("linear", mistral, 16384, original_context=8192)
    assert (resolved.rope_parameters["factor"], resolved.max_position_embeddings) == (2, 16384)


def test_original_context_that_contradicts_a_stored_one_is_refused():
    assert resolve_rope("llama3", LLAMA31, 262144, original_context=8192).extended
    with pytest.raises(ValueError, match="llama3 scaling starts from 8192"):
        resolve_rope("llama3", LLAMA31, 262144, original_context=131072)


@pytest.mark.parametrize(
    "base",
    [
        GPT2Config(),
        {"model_type": "bloom"},
        {"model_type": "mpt"},
        FalconConfig(alibi=True),
        {"model_type": "gptj"},
        {"model_type": "granitemoehybrid"},
        SimpleNamespace(max_position_embeddings=4096),
    ],
    ids=["gpt2", "bloom", "mpt", "falcon with alibi", "gptj", "nope", "unnamed"],
)
def test_a_base_without_rope_is_refused_by_name_unless_the_preset_is_none(base):
    name = base.get("model_type") if isinstance(base, dict) else getattr(base, "model_type", "unn")
    assert not has_rope(base)
    with pytest.raises(ValueError, match=rf"{name}.*write rope: none"):
        resolve_rope("linear", base, 8192)
    resolved = resolve_rope("none", base, 8192)
    assert (resolved.rope_parameters, resolved.config_fields) == ({}, {})


@pytest.mark.parametrize("preset", ["linear", "yarn", "dynamic", "llama3"])
def test_phi3_which_takes_longrope_only_is_refused_before_it_fails_to_load(preset):
    with pytest.raises(ValueError, match=r"'phi3' does not take.*write rope: ntk"):
        resolve_rope(preset, tiny(Phi3Config), TARGET)


def test_none_leaves_even_the_maximum_alone():
    config = tiny(LlamaConfig)
    before = config.to_dict()
    apply_rope(config, resolve_rope("none", config, TARGET))
    assert config.to_dict() == before


# ---- wrong input ----------------------------------------------------------------------------

WRONG = [
    ("yran", {}, "unknown RoPE preset 'yran'; did you mean 'yarn'"),
    ("", {}, "unknown RoPE preset"),
    (None, {}, "unknown RoPE preset"),
    ("yarn", {"beta_fats": 32}, "no option 'beta_fats'; did you mean 'beta_fast'"),
    ("linear", {"theta": 1e6}, "no option 'theta'"),
    ("yarn", {"original_max_position_embeddings": 4096}, "original_context: <tokens>"),
    ("none", {"factor": 2}, "none has no option 'factor'"),
    ("none", {"replace": True}, "none has no option 'replace'"),
    ("linear", {"factor": 4}, "factor 4 is too small.*write factor: 8"),
    ("linear", {"factor": 0}, "factor: got 0; write a number above 0"),
    ("ntk", {"factor": -8}, "factor: got -8"),
    ("yarn", {"factor": "8"}, "factor: got '8'"),
    ("yarn", {"factor": True}, "factor: got True"),
    ("yarn", {"factor": None}, "factor: got None"),
    ("dynamic", {"factor": math.nan}, "factor: got nan"),
    ("llama3", {"factor": math.inf}, "factor: got inf"),
    ("yarn", {"beta_fast": 1, "beta_slow": 32}, "beta_fast 1 must be above beta_slow 32"),
    ("yarn", {"mscale": 1.0}, "only together"),
    ("yarn", {"truncate": "no"}, "truncate: got 'no'; write true or false"),
    ("llama3", {"low_freq_factor": 4}, "high_freq_factor 4 must be above low_freq_factor 4"),
    ("theta", {}, r"no theta is given; write rope: \{preset: theta"),
    ("theta", {"theta": 1e6, "base": 1e6}, "both theta and base are given"),
    ("theta", {"theta": "5e5"}, r"here 500000 \(YAML reads 5e5 as text\)"),
    ("theta", {"theta": 0.5}, "theta: got 0.5; write a number above 1"),
    ("longrope", {}, "needs short_factor and long_factor, 64 numbers each"),
    ("longrope", {"short_factor": [1.0] * 64}, "needs long_factor"),
    ("longrope", {**lists(128), "long_factor": [1.0] * 63}, "long_factor: got 63 values"),
    ("longrope", {**lists(128), "long_factor": 4}, "long_factor: got 4; write a list of 64"),
    ("longrope", {**lists(128), "short_factor": [1.0] * 63 + [0]}, "short_factor: got 0"),
    ("linear", {"replace": "yes"}, "replace: got 'yes'"),
    ("linear", {"original_context": 0}, "original_context: got 0"),
    ("linear", {"original_context": True}, "original_context: got True"),
]


@pytest.mark.parametrize(("preset", "options", "message"), WRONG)
def test_a_wrong_preset_or_option_is_an_error_that_says_what_to_write(preset, options, message):
    with pytest.raises(ValueError, match=message):
        resolve_rope(preset, LLAMA2, 32768, **options)


@pytest.mark.parametrize("target", [0, -1, 32768.0, "32768", None, True])
def test_a_wrong_target_is_an_error(target):
    with pytest.raises(ValueError, match=r"sequence_len: got .*whole number of tokens"):
        resolve_rope("linear", LLAMA2, target)


def test_wrong_options_are_errors_even_where_nothing_is_extended():
    with pytest.raises(ValueError, match="beta_fats"):
        resolve_rope("yarn", LLAMA2, 4096, beta_fats=32)


def test_a_config_that_says_no_length_is_an_error_that_asks_for_it():
    with pytest.raises(ValueError, match="write original_context"):
        resolve_rope("linear", {"rope_theta": 1e4}, 8192)
    resolved = resolve_rope("linear", {"rope_theta": 1e4}, 8192, original_context=4096)
    assert resolved.rope_parameters["factor"] == 2


def test_a_config_that_transformers_cannot_read_is_a_value_error():
    with pytest.raises(ValueError, match="cannot read the base model's config"):
        resolve_rope("linear", {"model_type": "llama", "max_position_embeddings": "4k"}, 8192)


def test_ntk_without_known_head_dimensions_is_an_error():
    with pytest.raises(ValueError, match="more than 2 rotary dimensions"):
        resolve_rope("ntk", {"rope_theta": 1e4, "max_position_embeddings": 64}, 128)


def test_untruncated_yarn_is_refused_where_transformers_would_ignore_it():
    config = tiny(Gemma3TextConfig, **GEMMA3)
    with pytest.raises(ValueError, match="truncate: false has no effect"):
        resolve_rope("yarn", config, TARGET, truncate=False)


def test_layer_types_without_full_attention_are_refused():
    layers = {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    with pytest.raises(ValueError, match="only full_attention can be extended"):
        resolve_rope("linear", {**LLAMA2, "rope_parameters": layers}, 8192)


def test_an_explicit_factor_is_honoured_where_the_base_supports_the_target():
    resolved = resolve_rope("yarn", QWEN25, 32768, factor=4)
    assert resolved.extended
    assert resolved.rope_parameters["factor"] == 4
    assert resolved.max_position_embeddings == 32768


# ---- third-party presets --------------------------------------------------------------------


@pytest.fixture
def third_party():
    class Package:
        answer: object = None

        @hookimpl
        def longlora_rope_presets(self):
            return {"halves": lambda request: self.answer or {"rope_type": "linear", "factor": 2}}

    package = Package()
    registry.manager().register(package, name="halves-package")
    yield package
    registry.manager().unregister(package)


def test_a_third_party_preset_is_found_and_completed_with_the_bases_theta(third_party):
    resolved = resolve_rope("halves", LLAMA2, 8192)
    assert resolved.rope_parameters == {"rope_type": "linear", "factor": 2, "rope_theta": 10000.0}


@pytest.mark.parametrize(
    "answer", ["linear", {"factor": 2}, {"rope_type": 3}, {"rope_type": "linear", "factor": {1}}]
)
def test_a_third_party_preset_that_returns_rubbish_is_named(third_party, answer):
    third_party.answer = answer
    with pytest.raises(ValueError, match="preset 'halves' returned"):
        resolve_rope("halves", LLAMA2, 8192)


# ---- properties -----------------------------------------------------------------------------

SIMPLE = ["linear", "dynamic", "ntk", "yarn", "llama3"]


@settings(max_examples=60, deadline=None)
@given(
    preset=st.sampled_from(SIMPLE),
    original=st.integers(64, 1 << 17),
    target=st.integers(1, 1 << 20),
    theta=st.floats(1e3, 1e9),
    form=st.sampled_from([dict, SimpleNamespace, LlamaConfig]),
)
def test_any_unscaled_base_and_target(preset, original, target, theta, form):
    fields = {**TINY, "max_position_embeddings": original, "rope_theta": theta}
    base = form(**fields)
    before = copy.deepcopy(base)
    resolved = resolve_rope(preset, base, target)
    assert (base.to_dict() == before.to_dict()) if form is LlamaConfig else (base == before)
    parameters = resolved.rope_parameters
    assert json.loads(json.dumps(parameters)) == parameters
    assert resolved.pretrained_context == original
    assert resolved.extended == (target > original)
    if not resolved.extended:
        assert parameters == {"rope_type": "default", "rope_theta": theta}
        assert resolved.max_position_embeddings == original
        return
    assert parameters["rope_theta"] >= theta
    assert preset == "ntk" or parameters["rope_theta"] == theta
    assert resolved.factor >= target / original
    assert resolved.factor < target / original + 1
    assert parameters.get("original_max_position_embeddings", original) == original
    assert resolved.max_position_embeddings == (original if preset == "dynamic" else target)


@settings(max_examples=60, deadline=None)
@given(
    preset=st.sampled_from(SIMPLE),
    original=st.integers(64, 1 << 15),
    targets=st.lists(st.integers(64, 1 << 20), min_size=2, max_size=4).map(sorted),
)
def test_extending_a_scaled_base_again_only_grows_it(preset, original, targets):
    base = {**TINY, "max_position_embeddings": original, "rope_theta": 1e4}
    factor, theta = 1.0, 1e4
    for target in targets:
        resolved = resolve_rope(preset, base, target)
        parameters = resolved.rope_parameters
        assert parameters.get("factor", 1.0) >= factor
        assert parameters["rope_theta"] >= theta
        factor, theta = parameters.get("factor", 1.0), parameters["rope_theta"]
        base = {**base, **resolved.config_fields}
        assert base_context_of(base) >= target
        assert not resolve_rope(preset, base, target).extended


# ---- weight of the import -------------------------------------------------------------------


def test_resolving_a_plain_mapping_loads_neither_torch_nor_transformers():
    code = (
        "import sys; from longlora_plugin.rope import resolve_rope;"
        "resolve_rope('yarn', {'max_position_embeddings': 64, 'rope_theta': 1e4}, 128);"
        "assert not {'torch', 'transformers', 'axolotl'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)

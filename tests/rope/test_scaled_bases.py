"""Extending a base model that is scaled already: its own scaling is kept and stretched."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from rope_bases import LLAMA2, LLAMA31, LLAMA32, QWEN25_YARN
from rope_families import (
    GEMMA3,
    ORIGINAL,
    TARGET,
    TINY,
    buffer_of,
    build,
    lists,
    rotary_of,
    tiny,
)
from rope_oracle import (
    llama3_frequencies,
    longrope_frequencies,
)
from transformers import (
    AutoConfig,
    DeepseekV3Config,
    Gemma3TextConfig,
    LlamaConfig,
    Phi3Config,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from longlora_plugin.rope import (
    PRESETS,
    apply_rope,
    base_context_of,
    pretrained_context_of,
    resolve_rope,
    rope_parameters_of,
)

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

"""RoPE presets against formulas written out in float64, transformers' own frequency functions,
and the rotary buffers of whole tiny models.
"""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest
import torch
from rope_bases import LLAMA2, LLAMA31, QWEN25
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
from rope_oracle import (
    dynamic_frequencies,
    expected_frequencies,
    longrope_frequencies,
    plain,
    yarn_frequencies,
)
from transformers import (
    AutoConfig,
    Gemma3Config,
    LlamaConfig,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from longlora_plugin.rope import (
    PRESETS,
    apply_rope,
    resolve_rope,
    rope_parameters_of,
)

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

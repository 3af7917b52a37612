"""Every form of a base model's config, and what is wrong with a recipe's RoPE."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
from rope_bases import LLAMA2, LLAMA31, QWEN25
from rope_families import (
    GEMMA3,
    TARGET,
    lists,
    tiny,
)
from transformers import (
    FalconConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    Phi3Config,
)

from longlora_plugin.rope import (
    apply_rope,
    has_rope,
    resolve_rope,
    rope_parameters_of,
)

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

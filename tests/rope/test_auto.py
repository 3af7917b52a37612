"""`rope: auto` on the configs of the models people start from: what it chooses, and that a tiny
model of that config builds and rotates by transformers' formula."""

from __future__ import annotations

import pytest
import torch
from rope_families import rotary_of
from transformers import AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from longlora_plugin.rope import apply_rope, resolve_rope, rope_parameters_of
from longlora_plugin.rope.base_config import extended_layer

SIZES = {
    **{"vocab_size": 64, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
LLAMA3 = {
    **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 8192,
}
LONGROPE = {"short_factor": [1.0] * 8, "long_factor": [2.0 + i for i in range(8)]}
DEEPSEEK = {
    **{"head_dim": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16},
    **{"q_lora_rank": 16, "kv_lora_rank": 16, "n_routed_experts": 4, "n_group": 1},
    **{"topk_group": 1, "num_experts_per_tok": 1, "moe_intermediate_size": 16},
    **{"num_key_value_heads": 4, "first_k_dense_replace": 1, "n_shared_experts": 1},
}
DEEPSEEK_YARN = {
    **{"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096},
    **{"beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0},
}
GPT_OSS = {
    **{"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0},
    **{"truncate": False, "original_max_position_embeddings": 4096},
}
MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 512}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}


def config_of(model_type, maximum, theta, scaling=None, **fields):
    old = {"rope_theta": theta, "max_position_embeddings": maximum, "rope_scaling": scaling}
    return {"model_type": model_type, **SIZES, **old, **fields}


# name: (config, target, preset that `auto` takes, its factor)
BASES = {
    "Llama 2": (config_of("llama", 4096, 1e4), 32768, "yarn", 8),
    "Llama 3": (config_of("llama", 8192, 5e5), 65536, "yarn", 8),
    "Llama 3.1": (config_of("llama", 131072, 5e5, LLAMA3), 262144, "llama3", 32),
    "Llama 3.2": (
        config_of("llama", 131072, 5e5, {**LLAMA3, "factor": 32.0}), 262144, "llama3", 64
    ),
    "Llama 3.1, 64k": (config_of("llama", 131072, 5e5, LLAMA3), 65536, "none", 1),
    "Qwen2.5": (config_of("qwen2", 32768, 1e6), 131072, "yarn", 4),
    "Qwen2.5 with YaRN": (
        config_of(
            "qwen2",
            32768,
            1e6,
            {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
        ),
        262144,
        "yarn",
        8,
    ),
    "Qwen3": (config_of("qwen3", 40960, 1e6), 163840, "yarn", 4),
    "Mistral": (config_of("mistral", 32768, 1e6, sliding_window=None), 131072, "yarn", 4),
    "Mixtral": (config_of("mixtral", 32768, 1e6, head_dim=None, **EXPERTS), 131072, "yarn", 4),
    "MiniMax": (
        config_of(
            "minimax",
            32768,
            1e6,
            head_dim=None,
            layer_types=["linear_attention", "full_attention"],
            block_size=8,
            **EXPERTS,
        ),
        131072,
        "yarn",
        4,
    ),
    "Phi-3, 4k": (config_of("phi3", 4096, 1e4), 16384, "ntk", 4),
    "Phi-3, 128k": (
        config_of(
            "phi3",
            131072,
            1e4,
            {"type": "longrope", **LONGROPE},
            original_max_position_embeddings=4096,
        ),
        262144,
        "longrope",
        64,
    ),
    "Phi-4-mini": (
        config_of(
            "phi3",
            131072,
            1e4,
            {"type": "longrope", "short_factor": [1.0] * 6, "long_factor": [2.0] * 6},
            original_max_position_embeddings=4096,
            partial_rotary_factor=0.75,
        ),
        262144,
        "longrope",
        64,
    ),
    "Gemma 2": (config_of("gemma2", 8192, 1e4, **MIXED), 32768, "yarn", 4),
    "Gemma 3, 1B": (config_of("gemma3_text", 32768, 1e6, **MIXED), 131072, "yarn", 4),
    "Gemma 3, 4B": (
        config_of(
            "gemma3_text", 131072, 1e6, {"rope_type": "linear", "factor": 8.0}, **MIXED
        ),
        262144,
        "linear",
        16,
    ),
    "SmolLM2": (config_of("llama", 8192, 1e5), 16384, "yarn", 2),
    "SmolLM3": (config_of("smollm3", 65536, 5e6, no_rope_layers=[1, 0]), 131072, "yarn", 2),
    "OLMo 2": (config_of("olmo2", 4096, 5e5), 16384, "yarn", 4),
    "DeepSeek V2": (
        config_of("deepseek_v2", 163840, 1e4, DEEPSEEK_YARN, topk_method="greedy", **DEEPSEEK),
        327680,
        "yarn",
        80,
    ),
    "DeepSeek V3": (
        config_of("deepseek_v3", 163840, 1e4, DEEPSEEK_YARN, **DEEPSEEK), 327680, "yarn", 80
    ),
    "DeepSeek Coder": (
        config_of("llama", 16384, 1e5, {"type": "linear", "factor": 4.0}), 65536, "linear", 16
    ),
    "gpt-oss": (
        config_of("gpt_oss", 131072, 150000.0, GPT_OSS, **MIXED, **EXPERTS), 262144, "yarn", 64
    ),
    "GLM-4": (config_of("glm4", 32768, 1e4, partial_rotary_factor=0.5), 131072, "yarn", 4),
    "Falcon-H1": (
        config_of(
            "falcon_h1",
            131072,
            1e11,
            mamba_d_ssm=64,
            mamba_n_heads=8,
            mamba_d_head=8,
            mamba_d_state=8,
            mamba_n_groups=1,
            mamba_chunk_size=8,
        ),
        262144,
        "yarn",
        2,
    ),
    "a dynamic Llama": (
        config_of("llama", 4096, 1e4, {"type": "dynamic", "factor": 2.0}), 32768, "dynamic", 8
    ),
}  # fmt: skip


def built(base, settings):
    config = CONFIG_MAPPING[base["model_type"]].from_dict(
        {key: value for key, value in base.items() if key != "model_type"}
    )
    apply_rope(config, settings)
    return config, AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("name", BASES)
def test_auto_extends_the_models_people_start_from(name):
    base, target, preset, factor = BASES[name]
    settings = resolve_rope("auto", base, target)
    assert (settings.preset, settings.factor) == (preset, pytest.approx(factor))
    assert settings.chosen_by_auto
    assert settings.extended == (preset != "none")
    config, model = built(base, settings)
    layer_type, layer = extended_layer(rope_parameters_of(config))
    rotary = rotary_of(model)
    name = f"{layer_type}_inv_freq" if layer_type else "inv_freq"
    if layer["rope_type"] == "default":
        expected = layer["rope_theta"] ** -(torch.arange(0, 16, 2) / 16)
    else:
        expected = ROPE_INIT_FUNCTIONS[layer["rope_type"]](config, "cpu", layer_type=layer_type)[0]
    torch.testing.assert_close(getattr(rotary, name), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("model_type", ["cohere2", "exaone4"])
def test_auto_refuses_families_whose_full_attention_has_no_positions(model_type):
    base = config_of(model_type, 8192, 1e4, **MIXED)
    message = f"rope: auto: base model type '{model_type}' rotates in its sliding-window layers"
    with pytest.raises(ValueError, match=f"{message}.*Write rope: none"):
        resolve_rope("auto", base, 32768)


def test_exaone_4_without_a_window_rotates_everywhere_and_is_extended():
    layers = ["full_attention"] * 2
    base = config_of("exaone4", 8192, 1e4, sliding_window=None, layer_types=layers)
    assert resolve_rope("auto", base, 32768).preset == "yarn"


def test_auto_says_why():
    reasons = {
        name: resolve_rope("auto", base, target).chosen_by_auto
        for name, (base, target, *_) in BASES.items()
    }
    assert reasons["Llama 2"] == "the base model's RoPE is not scaled"
    assert reasons["Llama 3.1"] == "extends the base model's own llama3 scaling"
    assert reasons["Llama 3.1, 64k"] == "the base model handles 131072 tokens as it is"
    assert "phi3 does not take yarn" in reasons["Phi-3, 4k"]
    assert resolve_rope("yarn", BASES["Llama 2"][0], 8192).chosen_by_auto is None


def test_auto_can_drop_the_bases_scaling_and_has_no_option_of_a_preset():
    base = BASES["Llama 3.1"][0]
    replaced = resolve_rope("auto", base, 262144, replace=True)
    assert (replaced.preset, replaced.factor) == ("yarn", 32)
    with pytest.raises(ValueError, match=r"auto has no option 'factor'.*Options: replace"):
        resolve_rope("auto", base, 262144, factor=8)


# ---- linear bases whose maximum was left alone ----------------------------------------------


def linear_base(maximum, factor, theta=1e4):
    return config_of("llama", maximum, theta, {"type": "linear", "factor": factor})


@pytest.mark.parametrize("preset", ["linear", "auto"])
@pytest.mark.parametrize(
    ("maximum", "factor", "theta"),
    [(4096, 8.0, 1e4), (4096, 25.0, 1e4), (4096, 4.0, 1e4), (2048, 8.0, 1e4), (8192, 4.0, 5e5)],
)
def test_released_longlora_models_are_not_scaled_twice(preset, maximum, factor, theta):
    base = linear_base(maximum, factor, theta)
    supported = int(maximum * factor)
    assert not resolve_rope(preset, base, supported).extended
    longer = resolve_rope(preset, base, 2 * supported)
    assert longer.rope_parameters["factor"] == 2 * factor
    assert (longer.pretrained_context, longer.base_context) == (maximum, supported)


@pytest.mark.parametrize(
    ("maximum", "factor", "theta"),
    [(32768, 8.0, 1e4), (100000, 25.0, 1e4), (16384, 4.0, 1e4), (512, 4.0, 1e4), (32768, 4.0, 5e5)],
)
def test_what_this_package_extended_is_read_as_scaled(maximum, factor, theta):
    longer = resolve_rope("linear", linear_base(maximum, factor, theta), 2 * maximum)
    assert longer.rope_parameters["factor"] == 2 * factor
    assert longer.base_context == maximum


def test_a_linear_base_that_reads_two_ways_is_refused_with_both():
    base = linear_base(4096, 2.0)
    both = r"reads two ways: 2048 tokens extended to 4096 \(write original_context: 2048\), or 4096"
    with pytest.raises(ValueError, match=both):
        resolve_rope("linear", base, 8192)
    assert not resolve_rope("linear", base, 4096).extended
    assert not resolve_rope("linear", base, 8192, original_context=4096).extended
    assert resolve_rope("linear", base, 8192, original_context=2048).factor == 4

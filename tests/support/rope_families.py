"""Tiny configs of families that write RoPE in different ways, and what their models rotate by."""

from __future__ import annotations

from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
)

TINY = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ORIGINAL, TARGET = 128, 512


def tiny(config_class, **fields):
    return config_class(**{**TINY, "max_position_embeddings": ORIGINAL, **fields})


# name: (config, θ, rotary dimensions, layer type)
FAMILIES = {
    "llama": (lambda: tiny(LlamaConfig, rope_theta=5e5), 5e5, 32, None),
    "mistral": (lambda: tiny(MistralConfig, rope_theta=1e4), 1e4, 32, None),
    "qwen2": (lambda: tiny(Qwen2Config, rope_theta=1e6), 1e6, 32, None),
    "gpt_neox": (lambda: tiny(GPTNeoXConfig, rotary_pct=0.25), 1e4, 8, None),
    "qwen3": (lambda: tiny(Qwen3Config, rope_theta=1e6, head_dim=16), 1e6, 16, None),
    "olmo2": (lambda: tiny(Olmo2Config, rope_theta=5e5), 5e5, 32, None),
    "phi": (lambda: tiny(PhiConfig), 1e4, 16, None),
    "phi3": (lambda: tiny(Phi3Config, partial_rotary_factor=0.5), 1e4, 16, None),
    "gemma3": (lambda: tiny(Gemma3TextConfig, **GEMMA3), 1e6, 16, "full_attention"),
    "deepseek": (lambda: tiny(DeepseekV3Config, **DEEPSEEK), 1e4, 8, None),
}
GEMMA3 = {
    "head_dim": 16,
    "sliding_window": 64,
    "layer_types": ["sliding_attention", "full_attention"],
}
DEEPSEEK = {
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 1,
    "first_k_dense_replace": 2,
}


def lists(dim):
    short = [1.0 + i / 10 for i in range(dim // 2)]
    return {"short_factor": short, "long_factor": [4.0 + i for i in range(dim // 2)]}


def options_for(preset, dim):
    return {"theta": {"theta": 2e7}, "longrope": lists(dim)}.get(preset, {})


def rotary_of(model):
    return next(module for name, module in model.named_modules() if name.endswith("rotary_emb"))


def buffer_of(model, layer_type=None):
    name = f"{layer_type}_inv_freq" if layer_type else "inv_freq"
    return getattr(rotary_of(model), name).double().numpy()


def build(config):
    return AutoModelForCausalLM.from_config(config).eval()

"""Decoder families that S²-Attn refuses, at tiny random sizes, each with its reason."""

from __future__ import annotations

from family_models import EXPERTS, LATENT_DEEPSEEK, NO_ATTENTION, VISION, Family, with_vision

NOT_CAUSAL, SPARSE = "is not causal", "is deepseek sparse attention"
NO_INTERFACE = "does not go through transformers' attention interface"
NONE_THERE = "no attention of it goes through the interface of transformers"

UNSUPPORTED: dict[str, tuple[Family, str]] = {
    "axk2": (LATENT_DEEPSEEK, SPARSE),
    "bloom": (Family(), NONE_THERE),
    "codegen": (Family({"rotary_dim": 4}), NONE_THERE),
    "cpmant": (Family(), NONE_THERE),
    "deepseek_v32": (LATENT_DEEPSEEK, SPARSE),
    "deepseek_v4": (
        Family(
            {
                **EXPERTS,
                "q_lora_rank": 12,
                "o_lora_rank": 8,
                "n_routed_experts": 4,
                "index_n_heads": 2,
                "index_head_dim": 8,
                "qk_rope_head_dim": 4,
            }
        ),
        "is heavily compressed attention",
    ),
    "doge": (Family(), NOT_CAUSAL),
    "falcon": (Family({"head_dim": None}), NO_INTERFACE),
    "falcon_mamba": (Family({"state_size": 8}), NO_ATTENTION),
    "glm_moe_dsa": (LATENT_DEEPSEEK, SPARSE),
    "gpt_neo": (
        Family(
            {
                "num_hidden_layers": None,
                "num_layers": 2,
                "attention_types": [[["global", "local"], 1]],
                "num_heads": 4,
            }
        ),
        NO_INTERFACE,
    ),
    "gpt_neox_japanese": (Family(), NONE_THERE),
    "gptj": (Family({"rotary_dim": 4}), NO_INTERFACE),
    "inkling_text": (Family({**EXPERTS, "layer_types": ["hybrid"] * 2}), "adds a position bias"),
    "mamba": (Family({"state_size": 8}), NO_ATTENTION),
    "mistral": (Family({"sliding_window": 6}), "has a sliding window of 6 tokens"),
    "mpt": (Family({"d_model": 32, "n_heads": 4, "n_layers": 2}), NONE_THERE),
    "openai-gpt": (Family(), NONE_THERE),
    "paligemma": (
        with_vision(
            Family({"model_type": "gemma"}),
            "",
            vision_config={**VISION, "projection_dim": 32, "model_type": "siglip_vision_model"},
        ),
        f"GemmaAttention {NOT_CAUSAL}",
    ),
    "recurrent_gemma": (Family(), NONE_THERE),
    "rwkv": (Family({"attention_hidden_size": 32}), NONE_THERE),
    "xglm": (Family({"ffn_dim": 48, "attention_heads": 4, "num_layers": 2}), NONE_THERE),
}

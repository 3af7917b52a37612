"""Which layers a family's RoPE reaches: scaling it is worth something in full attention only.

Some families rotate in their short layers (sliding window, chunks) and have no positions where they
attend to everything. There the new context meets no unseen angle: longer rows train it, RoPE has
no part in it, and scaling would only blur the short layers.
"""

from __future__ import annotations

from typing import Any

_ROTATE_SLIDING_LAYERS_ONLY = ("afmoe", "cohere2", "cohere2_moe", "exaone4", "exaone_moe")
_NEVER_LOOK_AT_THE_LENGTH = (
    *("phimoe", "qwen2_vl_text", "qwen2_5_vl_text", "qwen2_5_omni_text"),
    *("qwen2_5_omni_talker", "paddleocr_vl_text"),
)
"""Families whose rotary module in transformers 5 keeps its first frequencies however long a row."""

__all__ = ["why_not_extendable"]


def why_not_extendable(config: Any, rope_type: str) -> str | None:
    """Why such a scaling does not extend this text model, and what to write; None where it does.

    Args:
        config: the text model's config.
        rope_type: of the scaling to be written.
    """
    model_type = getattr(config, "model_type", None)
    short = None
    if model_type in _ROTATE_SLIDING_LAYERS_ONLY and getattr(config, "sliding_window", None):
        short = f"sliding-window layers only, which see {config.sliding_window} tokens"
    rotates = getattr(config, "no_rope_layers", None) or []  # 1 where a layer rotates
    types = getattr(config, "layer_types", None) or ["full_attention"] * len(rotates)
    full = [bool(on) for on, kind in zip(rotates, types, strict=False) if kind == "full_attention"]
    if rotates and not any(full):
        chunk = getattr(config, "attention_chunk_size", None)
        short = f"chunked layers only, which see {chunk} tokens"
    if short:
        return (
            f"rotates in its {short}; its full attention has no positions, so longer rows alone "
            "extend it. Write rope: none"
        )
    if model_type in _NEVER_LOOK_AT_THE_LENGTH and rope_type in ("longrope", "dynamic"):
        return (
            f"keeps its first frequencies in transformers however long a row is, so {rope_type} "
            "has no effect. Write rope: {preset: ntk, replace: true}"
        )
    return None

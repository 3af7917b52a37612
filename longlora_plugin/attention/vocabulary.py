"""The words of transformers' configs for attention, and the one reading of them. Loads no torch.

Kinds of layers (`layer_types`) attend to the whole document, to a window, or not at all; a family
without the list has layers of one kind. Implementations (`attn_implementation`) name what computes
it: eligibility judges by these words, `plan` counts by them.
"""

from __future__ import annotations

from typing import Any

FULL_ATTENTION = frozenset({"full_attention", "attention", "hybrid"})
"""Kinds that attend to the whole document; `hybrid` layers also have a recurrence."""

WITHOUT_ATTENTION = frozenset({"linear_attention", "mamba", "recurrent", "conv", "moe", "mlp"})
"""Kinds that compute no scores of queries and keys."""

WINDOW_KEYS = {
    "sliding_attention": "sliding_window",
    "hybrid_sliding": "sliding_window",
    "chunked_attention": "attention_chunk_size",
    "deepseek_sparse_attention": "index_topk",
}
"""Kind → the config's field that says how many keys a query sees."""

SUPPORTED = (
    "sdpa",
    "eager",
    "flash_attention_2",
    "flash_attention_3",
    "flash_attention_4",
    "flex_attention",
    "a flash-attn kernel of the hub (kernels-community/flash-attn2, …)",
)
"""Implementations that S²-Attn can take the place of."""


def limits_attention(window: int | None, config: Any) -> bool:
    """Whether a window is narrower than the longest sequence of the model."""
    longest = getattr(config, "max_position_embeddings", None)
    return bool(window) and (longest is None or window < longest)


def layer_windows(config: Any) -> tuple[int | None, ...]:
    """For each layer that attends, how many keys a query sees; None: the whole document.

    A kind that is not known here counts as the whole document, which is never too few.

    Args:
        config: of the text decoder.
    """
    kinds = getattr(config, "layer_types", None)
    if not kinds:
        kinds = ["sliding_attention"] * config.num_hidden_layers
    windows = (
        getattr(config, WINDOW_KEYS.get(kind, ""), None)
        for kind in kinds
        if kind not in WITHOUT_ATTENTION
    )
    return tuple(window if limits_attention(window, config) else None for window in windows)


def kernel_kind(implementation: str | None) -> str:
    """`sdpa`, `eager`, `flex` or `flash`: what computes S²-Attn in place of `implementation`.

    Raises:
        ValueError: S²-Attn has no such back end; names the supported ones.
    """
    name = (implementation or "").split("@")[0]
    if name in ("flash_attention_2", "flash_attention_3", "flash_attention_4") or (
        "/" in name and "flash" in name and "|" not in name
    ):
        return "flash"
    if implementation in ("sdpa", "eager", "flex_attention"):
        return implementation.removesuffix("_attention")
    raise ValueError(
        f"shifted attention does not support attn_implementation: {implementation}; "
        f"write one of {', '.join(SUPPORTED)}, or longlora: {{shifted_attention: false}}"
    )

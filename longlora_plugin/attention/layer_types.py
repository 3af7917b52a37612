"""Which layers attend to the whole document, to a window, or not at all, as a config says it.

transformers' configs list a kind for each layer (`layer_types`); a family without the list has
layers of one kind. The one reading of those words: eligibility judges built layers by it, `plan`
counts by it. Imports nothing heavy.
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

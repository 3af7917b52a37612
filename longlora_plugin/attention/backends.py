"""Which kernel computes S²-Attn, by transformers' name of the attention implementation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from longlora_plugin.attention import packing
from longlora_plugin.attention.call import AttentionCall
from longlora_plugin.attention.flex import flex_attention
from longlora_plugin.attention.halo import with_dummy_queries
from longlora_plugin.attention.layout import S2, AttentionPattern, head_runs
from longlora_plugin.attention.sdpa import eager_kernel, grouped_attention, sdpa_kernel
from longlora_plugin.attention.varlen import (
    flash_attention,
    torch_varlen,
    torch_varlen_serves,
    varlen_attention,
)
from longlora_plugin.attention.vocabulary import kernel_kind

Backend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, AttentionCall], torch.Tensor]
"""S²-Attn of a batch: (q_BHND, k_BKND, v_BKND, call) → [B, N, H, D]."""


def backend_for(implementation: str | None) -> Backend:
    """The function that computes S²-Attn where the model would use `implementation`.

    Raises:
        ValueError: S²-Attn has no such back end; names the supported ones.
    """
    kind = kernel_kind(implementation)
    if kind == "flash":
        return partial(flash_attention, implementation=str(implementation))
    if kind == "sdpa":
        return _sdpa
    if kind == "flex":
        return partial(with_dummy_queries, flex_attention)
    return partial(with_dummy_queries, partial(grouped_attention, kernel=eager_kernel))


def _sdpa(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: AttentionCall
) -> torch.Tensor:
    # Packed and padded rows have segments of many lengths, each a kernel call (and on Hopper a plan
    # of cuDNN) of its own in SDPA. Rows without either keep SDPA: nobody measured them faster.
    if not call.documents.are_rows and torch_varlen_serves(query, value, call):
        return varlen_attention(query, key, value, call, kernel=torch_varlen)
    grouped = partial(grouped_attention, kernel=sdpa_kernel)
    return with_dummy_queries(grouped, query, key, value, call)


def check_settings(group_size: int, full_attention_below: int) -> None:
    """Raise ValueError unless `group_size` is even and at least 2, the other not negative."""
    if isinstance(group_size, bool) or not isinstance(group_size, int):
        raise ValueError(f"group_size must be a whole number of tokens, got {group_size!r}")
    if group_size < 2 or group_size % 2:
        raise ValueError(f"group_size must be even and at least 2, got {group_size}")
    if full_attention_below < 0:
        raise ValueError(f"full_attention_below must not be negative, got {full_attention_below}")


def _check_shapes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 4:
            raise ValueError(
                f"{name} must be [batch, heads, seq, head_dim], got shape {list(tensor.shape)}"
            )
    batch, heads, length, head_dim = query.shape
    kv_heads = key.shape[1]
    if (
        key.shape != (batch, kv_heads, length, head_dim)
        or value.shape[:3] != key.shape[:3]
        or kv_heads == 0
        or heads % kv_heads
    ):
        raise ValueError(
            f"query {list(query.shape)}, key {list(key.shape)} and value {list(value.shape)} do "
            "not fit: batch, seq and head_dim must be equal, heads a multiple of kv_heads"
        )


def shifted_sparse_attention(  # noqa: PLR0913  (the public signature)
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    group_size: int,
    scale: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    full_attention_below: int = 0,
    backend: str = "sdpa",
    pattern: AttentionPattern = S2,
) -> torch.Tensor:
    """Shifted sparse attention (LongLoRA, section 3.2, the variant that leaks nothing).

    Half of the KV heads attend causally inside groups of `group_size` tokens, the other half
    inside groups moved by half a group; query heads go with their KV head.

    Args:
        query: [batch, heads, seq, head_dim].
        key, value: [batch, kv_heads, seq, head_dim]; `heads` is a multiple of `kv_heads`.
        group_size: tokens in a group, even, at least 2; any `seq` works.
        scale: factor on the scores; default head_dim ** -0.5.
        cu_seqlens: int32 [documents + 1], boundaries of packed documents; batch must be 1.
        full_attention_below: documents of up to this many tokens use full causal attention.
        backend: transformers' name of an attention implementation (`sdpa`, `eager`,
            `flash_attention_2`, `flex_attention`, …).
        pattern: who attends to whom.

    Returns:
        [batch, heads, seq, head_dim].

    Raises:
        ValueError: shapes, group size, boundaries or back end are not as above.
    """
    check_settings(group_size, full_attention_below)
    _check_shapes(query, key, value)
    batch, heads, length, _ = query.shape
    if cu_seqlens is not None and batch != 1:
        raise ValueError(f"cu_seqlens describes one packed row, got a batch of {batch}")
    attend = backend_for(backend)
    if 0 in query.shape:
        return query.new_zeros(batch, heads, length, value.shape[-1])
    documents = (
        packing.whole_rows(batch, length)
        if cu_seqlens is None
        else packing.from_boundaries(cu_seqlens, length)
    )
    call = AttentionCall(
        documents=documents,
        runs=head_runs(pattern, heads, key.shape[1], group_size),
        group_size=group_size,
        full_attention_below=full_attention_below,
        scale=scale,
    )
    return attend(query, key, value, call).transpose(1, 2)

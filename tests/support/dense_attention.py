"""The oracle once more, without Python loops and for documents and padding anywhere.

`reference.py` is the definition; a test holds that this equals it. Imports nothing from the
package.
"""

from __future__ import annotations

import torch
from reference import head_is_shifted


def masks(
    document_ids: torch.Tensor,
    group_size: int,
    heads: int,
    kv_heads: int,
    full_attention_below: int = 0,
    shifts: list[int] | None = None,
) -> torch.Tensor:
    """bool [heads, tokens, tokens] of one row: may row i attend to column j?

    Args:
        document_ids: [tokens], equal for the tokens of one document, -1 for padding.
        shifts: of each head; default: those of S².
    """
    if shifts is None:
        shifts = [
            group_size // 2 if head_is_shifted(h, heads, kv_heads) else 0 for h in range(heads)
        ]
    index = torch.arange(len(document_ids))
    same_document = document_ids[:, None] == document_ids[None, :]
    position = (same_document & (index[:, None] > index[None, :])).sum(1)
    short = same_document.sum(1) <= full_attention_below
    causal = same_document & (index[:, None] >= index[None, :]) & (document_ids >= 0)[:, None]
    per_head = []
    for shift in shifts:
        segment = (position + shift) // group_size
        per_head.append(causal & ((segment[:, None] == segment[None, :]) | short[:, None]))
    return torch.stack(per_head)


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """Attention where `mask` is True, [B, H, N, D].

    Args:
        query: [B, H, N, D]; key, value: [B, K, N, D].
        mask: bool [H, N, N] or [B, H, N, N]; rows that see nothing (padding) come out as zero.
        dtype: float64 for the definition; another to see what computing in it costs.
    """
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        sink = sinks.to(dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sink], -1)
    nothing = scores.isneginf().all(-1, keepdim=True)
    weights = scores.masked_fill(nothing, 0).softmax(-1)[..., : key.shape[2]]
    return (weights * mask) @ value

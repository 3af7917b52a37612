"""The oracle: shifted sparse attention by its definition, dense and in float64.

Imports nothing from the package. Written for being obviously right, not for speed.
"""

from __future__ import annotations

import torch


def head_is_shifted(head: int, heads: int, kv_heads: int) -> bool:
    """The second half of the KV heads is shifted, query heads go with theirs; odd: plain extra."""
    if kv_heads == 1:
        return head >= (heads + 1) // 2
    return head // (heads // kv_heads) >= (kv_heads + 1) // 2


def allowed(
    document_lengths: list[int],
    group_size: int,
    *,
    shifted: bool,
    full_attention_below: int = 0,
) -> torch.Tensor:
    """bool [tokens, tokens]: may row i attend to column j."""
    total = sum(document_lengths)
    mask = torch.zeros(total, total, dtype=torch.bool)
    shift = group_size // 2 if shifted else 0
    start = 0
    for length in document_lengths:
        for i in range(length):
            for j in range(i + 1):
                same = (i + shift) // group_size == (j + shift) // group_size
                mask[start + i, start + j] = same or length <= full_attention_below
        start += length
    return mask


def head_masks(
    document_lengths: list[int],
    group_size: int,
    heads: int,
    kv_heads: int,
    full_attention_below: int = 0,
) -> torch.Tensor:
    """bool [heads, tokens, tokens]."""
    kinds = [
        allowed(
            document_lengths,
            group_size,
            shifted=shifted,
            full_attention_below=full_attention_below,
        )
        for shifted in (False, True)
    ]
    return torch.stack([kinds[head_is_shifted(h, heads, kv_heads)] for h in range(heads)])


def reference_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    group_size: int,
    scale: float | None = None,
    document_lengths: list[int] | None = None,
    full_attention_below: int = 0,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """query [B, H, N, D], key and value [B, K, N, D] → [B, H, N, D], all float64."""
    query, key, value = query.double(), key.double(), value.double()
    batch, heads, length, head_dim = query.shape
    kv_heads = key.shape[1]
    masks = head_masks(
        document_lengths or [length], group_size, heads, kv_heads, full_attention_below
    )
    outputs = []
    for h in range(heads):
        kv = h // (heads // kv_heads)
        scores = query[:, h] @ key[:, kv].transpose(-1, -2)
        scores = scores * (head_dim**-0.5 if scale is None else scale)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~masks[h], -torch.inf)
        if sinks is not None:
            sink = sinks[h].double().expand(batch, length, 1)
            weights = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
        else:
            weights = scores.softmax(-1)
        outputs.append(weights @ value[:, kv])
    return torch.stack(outputs, dim=1)

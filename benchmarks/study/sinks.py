"""S²-Attn with attention sinks, one of the remedies compared: an oracle, not a kernel.

Each query also sees the first `sinks` tokens of its window. Written as one dense mask for torch's
attention, so it costs as much as full attention here; what a kernel would cost is counted instead
(`cost.py`).

Shapes: B batch, H query heads, K KV heads, N tokens, D head width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longlora_plugin.attention import S2


def allowed(heads: int, length: int, group: int, sinks: int = 0) -> Tensor:
    """Who sees whom under S²-Attn: bool [H, N, N], query before key."""
    position = torch.arange(length)
    causal = position[:, None] >= position
    sink = position < sinks
    masks = []
    for shift in S2.shifts(heads, group):
        groups = (position + shift).div(group, rounding_mode="floor")
        masks.append(causal & ((groups[:, None] == groups) | sink))
    return torch.stack(masks)


def attend_with_sinks(group: int, sinks: int, length: int) -> Callable[..., Any]:
    """An attention function of transformers for windows of `length` tokens."""
    masks: dict[int, Tensor] = {}

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        heads = query.shape[1]
        if heads not in masks:
            masks[heads] = allowed(heads, length, group, sinks)
        out_BHND = F.scaled_dot_product_attention(
            query, key, value, masks[heads][None], scale=kwargs.get("scaling"), enable_gqa=True
        )
        return out_BHND.transpose(1, 2).contiguous(), None

    return attend

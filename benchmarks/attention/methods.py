"""What is timed: full attention, the floor, the published algorithm, ours.

Shapes: B batch, H heads, N tokens, G tokens in a group, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn.functional import scaled_dot_product_attention

from longlora_plugin.attention import shifted_sparse_attention


def roll_and_matmul(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, group_size: int
) -> torch.Tensor:
    """LongLoRA's published algorithm, [B, H, N, D] → [B, H, N, D]; it leaks the future."""
    batch, heads, length, head_dim = query.shape
    repeats = heads // key.shape[1]
    key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    half = heads // 2

    def group(x: torch.Tensor) -> torch.Tensor:
        x = torch.cat([x[:, :half], x[:, half:].roll(-group_size // 2, dims=2)], dim=1)
        x = x.transpose(1, 2).reshape(batch * length // group_size, group_size, heads, head_dim)
        return x.transpose(1, 2)

    query, key, value = group(query), group(key), group(value)
    scores = query @ key.transpose(2, 3) * head_dim**-0.5
    later = torch.full((group_size, group_size), -torch.inf, device=query.device).triu(1)
    scores = scores + later.to(scores.dtype)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    out = (weights @ value).transpose(1, 2).reshape(batch, length, heads, head_dim)
    out = torch.cat(
        [out[:, :, :half], out[:, :, half:].roll(group_size // 2, dims=1)],
        dim=2,
    )
    return out.transpose(1, 2)


Step = Callable[[], None]
"""Forward and backward once."""
Method = tuple[str, int | None]
"""Name and group size; None for full attention, which has none."""


@dataclass(frozen=True)
class Setup:
    """What all cases of a run share.

    Attributes:
        roll_up_to: the longest row for roll-and-matmul.
        floor_strides_of_modules: the floor's leaves lie in memory as those of the others do
            ([…, G, H, D]); else each head's tokens follow each other, which is the CPU's best.
    """

    heads: int
    head_dim: int
    device: str
    dtype: torch.dtype
    backends: tuple[str, ...]
    roll_up_to: int
    floor_strides_of_modules: bool = False


def steps(
    length: int, group_sizes: Iterable[int], kv_heads: int, setup: Setup
) -> dict[Method, Step]:
    """Everything that is timed on rows of one length."""
    heads, head_dim, device, dtype = setup.heads, setup.head_dim, setup.device, setup.dtype
    qkv = [
        torch.randn(1, length, h, head_dim).to(device, dtype).transpose(1, 2).requires_grad_()
        for h in (heads, kv_heads, kv_heads)
    ]

    def run(attend: Callable[..., torch.Tensor], inputs: list[torch.Tensor]) -> None:
        out = attend(*inputs)
        out.backward(torch.ones_like(out))
        for leaf in inputs:
            leaf.grad = None

    def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
        )

    def floor(group_size: int) -> Step:
        plain = kv_heads - kv_heads // 2

        def leaf(h: int) -> torch.Tensor:
            shape = (length // group_size, group_size, h, head_dim)
            x = torch.randn(shape).to(device, dtype).transpose(1, 2)
            return (x if setup.floor_strides_of_modules else x.contiguous()).requires_grad_()

        halves = [
            [leaf(h) for h in (kv * heads // kv_heads, kv, kv)] for kv in (plain, kv_heads - plain)
        ]

        def step() -> None:
            outs = [sdpa(*half) for half in halves]
            torch.autograd.backward(outs, [torch.ones_like(out) for out in outs])
            for half in halves:
                for leaf in half:
                    leaf.grad = None

        return step

    methods: dict[Method, Step] = {("full", None): lambda: run(sdpa, qkv)}
    for group_size in group_sizes:
        methods["floor", group_size] = floor(group_size)
        if length <= setup.roll_up_to:
            roll = partial(roll_and_matmul, group_size=group_size)
            methods["roll", group_size] = partial(run, roll, qkv)
        for backend in setup.backends:
            ours = partial(shifted_sparse_attention, group_size=group_size, backend=backend)
            methods[f"s2 {backend}", group_size] = partial(run, ours, qkv)
    return methods

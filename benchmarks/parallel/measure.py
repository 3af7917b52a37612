"""One process of a case: its shard, what collectives moved, how far it is from the whole row."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from longlora_plugin.attention import S2, shifted_sparse_attention
from longlora_plugin.attention.backends import backend_for
from longlora_plugin.attention.call import AttentionCall
from longlora_plugin.attention.gather import Shards
from longlora_plugin.attention.halo import sharded_attention
from longlora_plugin.attention.layout import head_runs

SECONDS = 120
"""After which a process counts as hanging."""

Attend = Callable[..., torch.Tensor]
"""Attention of (q_BHND, k_BKND, v_BKND) → [B, N, H, D]."""


@dataclass(frozen=True)
class Case:
    """A row of `tokens` over `processes`, and the heads of a layer."""

    processes: int
    tokens: int
    group_size: int
    heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class Counted:
    """What one process saw of one layer.

    Attributes:
        exchanges, received: all-to-alls and numbers that came, forward.
        backward_exchanges, returned: the same, backward.
        output_error, gradient_error: largest absolute difference from one process, float64.
    """

    exchanges: int
    received: int
    backward_exchanges: int
    returned: int
    output_error: float
    gradient_error: float


def process(rank: int, meeting: str, case: Case, pipe: Any) -> None:
    """Run one layer on this process's shard and send what was `Counted`."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{meeting}",
        rank=rank,
        world_size=case.processes,
        timeout=timedelta(seconds=SECONDS),
    )
    draw = torch.Generator().manual_seed(0)
    whole = [
        torch.randn(1, case.tokens, h, case.head_dim, generator=draw, dtype=torch.float64)
        for h in (case.heads, case.kv_heads, case.kv_heads, case.heads)
    ]
    shard = case.tokens // case.processes
    cut = slice(rank * shard, (rank + 1) * shard)

    def alone(*qkv: torch.Tensor) -> torch.Tensor:
        return shifted_sparse_attention(*qkv, group_size=case.group_size).transpose(1, 2)

    wanted, _ = _step(alone, whole)
    found, (forward, backward) = _step(_shared(case, cut), [x[:, cut] for x in whole])
    errors = [(a - b[:, cut]).abs().max().item() for a, b in zip(found, wanted, strict=True)]
    pipe.send(
        Counted(
            exchanges=len(forward),
            received=sum(forward),
            backward_exchanges=len(backward),
            returned=sum(backward),
            output_error=errors[0],
            gradient_error=max(errors[1:]),
        )
    )
    dist.destroy_process_group()


def _shared(case: Case, cut: slice) -> Attend:
    shards = Shards(dist.group.WORLD)

    def attend(*qkv: torch.Tensor) -> torch.Tensor:
        row = shards.gather(
            torch.arange(case.tokens)[None, cut],
            None,
            batch=1,
            length=cut.stop - cut.start,
            device=qkv[0].device,
        )
        call = AttentionCall(
            documents=row.local,
            runs=head_runs(S2, case.heads, case.kv_heads, case.group_size),
            group_size=case.group_size,
        )
        return sharded_attention(backend_for("sdpa"), *qkv, call, row, shards.group)

    return attend


def _step(
    attend: Attend, tensors: list[torch.Tensor]
) -> tuple[list[torch.Tensor], tuple[list[int], list[int]]]:
    """Output and gradients of (query, key, value, the output's gradient), [1, N, heads, D] each,
    and the numbers that each all-to-all brought, forward and backward.
    """
    leaves = [x.clone().requires_grad_() for x in tensors[:3]]
    with _exchanges() as forward:
        out = attend(*(x.transpose(1, 2) for x in leaves))
    with _exchanges() as backward:
        (out * tensors[3]).sum().backward()
    return [out.detach(), *(x.grad for x in leaves)], (forward, backward)


@contextmanager
def _exchanges() -> Iterator[list[int]]:
    came: list[int] = []
    original = dist.all_to_all_single

    def all_to_all_single(out: torch.Tensor, *given: Any, **options: Any) -> Any:
        came.append(out.numel())
        return original(out, *given, **options)

    with patch.object(dist, "all_to_all_single", all_to_all_single):
        yield came

"""Two processes that share a row, against one process that has it whole: what context parallelism
needs of a machine.
"""

from __future__ import annotations

import tempfile
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from longlora_plugin.attention import S2, shifted_sparse_attention
from longlora_plugin.attention.backends import backend_for
from longlora_plugin.attention.call import AttentionCall
from longlora_plugin.attention.halo import exchange_of, sharded_attention
from longlora_plugin.attention.layout import head_runs
from longlora_plugin.attention.shards import Row

TOKENS, GROUP, HEADS, KV_HEADS, HEAD_DIM = 64, 16, 4, 2, 32
SECONDS = 120
ALLOWED = 1e-4


def try_exchange() -> None:
    """S²-Attn forward and backward in two processes; prints what ran, or raises.

    On two GPUs over NCCL where there are as many, else on the CPU over gloo.
    """
    device = "cuda" if torch.cuda.device_count() > 1 else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_half, args=(f"{folder}/meeting", device), nprocs=2)


def _half(rank: int, meeting: str, kind: str) -> None:
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    backend = "nccl" if kind == "cuda" else "gloo"
    if kind == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend,
        init_method=f"file://{meeting}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=SECONDS),
    )
    draw = torch.Generator().manual_seed(0)
    whole = [
        torch.randn(1, heads, TOKENS, HEAD_DIM, generator=draw).to(device).requires_grad_()
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    ]
    weights = torch.randn(1, HEADS, TOKENS, HEAD_DIM, generator=draw).to(device)
    expected = shifted_sparse_attention(*whole, group_size=GROUP)
    wanted = [expected, *torch.autograd.grad((expected * weights).sum(), whole)]

    mine = slice(rank * TOKENS // 2, (rank + 1) * TOKENS // 2)
    query, key, value = shard = [x[:, :, mine].detach().requires_grad_() for x in whole]
    row = Row.of(np.split(np.arange(TOKENS)[None], 2, axis=1), rank)
    runs = head_runs(S2, HEADS, KV_HEADS, GROUP)
    call = AttentionCall(documents=row.local, runs=runs, group_size=GROUP)
    attend = backend_for("sdpa")
    out = sharded_attention(attend, query, key, value, call, row, dist.group.WORLD).transpose(1, 2)
    got = [out, *torch.autograd.grad((out * weights[:, :, mine]).sum(), shard)]
    error = max(
        float((x - y[:, :, mine]).detach().abs().max() / y.detach().abs().max())
        for x, y in zip(got, wanted, strict=True)
    )
    if not error <= ALLOWED:
        raise ValueError(f"a shared row is wrong by {error:.1e} of the largest value")
    if rank == 0:
        sent = exchange_of(row, key, value, call).received
        print(
            f"TRIAL two processes over {backend} exchange {sent:,} bytes a layer; outputs and "
            f"gradients equal one process (error {error:.0e})",
            flush=True,
        )
    dist.destroy_process_group()

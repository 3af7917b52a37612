"""Every back end against dense masks in float64, forward and gradients, and which kernels ran.

The oracle is S²-Attn's definition written out; it shares no code with the package. Shapes:
B batch, H query heads, K KV heads, N tokens, D head_dim. Inputs are rounded to the dtype first, so
the error is the kernel's own: ‖got − wanted‖ / ‖wanted‖. bf16 gives 2 to 6 · 10⁻³ where all is
well, fp16 an eighth of it, fp32 10⁻⁶.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.attention.measure import usable_backends
from benchmarks.gpu.cases import Exact
from benchmarks.gpu.profiling import kernel_names
from benchmarks.gpu.rows import NotHere
from longlora_plugin.attention.backends import backend_for
from longlora_plugin.attention.call import AttentionCall
from longlora_plugin.attention.layout import S2, head_runs
from longlora_plugin.attention.packing import from_ids

ALLOWED = {"bfloat16": 2e-2, "float16": 3e-3, "float32": 1e-4}
PARTS = ("out", "dq", "dk", "dv")


def document_ids(rows: str, length: int) -> torch.Tensor:
    """Integer [B, N] of one kind of rows: each token's document, -1 for padding."""
    if rows == "packed":
        cuts = torch.tensor([length // 3, length // 3 + 1, length * 2 // 3])
        return torch.bucketize(torch.arange(length), cuts, right=True)[None]
    ids = torch.zeros(2, length, dtype=torch.long)
    if rows == "padded":
        ids[0, length * 3 // 4 :] = -1
        ids[1, : length // 5] = -1
    return ids


def visible(ids_N: torch.Tensor, group_size: int, shift: int) -> torch.Tensor:
    """bool [N, N] of one row: may token i see token j?"""
    same = ids_N[:, None] == ids_N[None, :]
    before = torch.ones(len(ids_N), len(ids_N), dtype=torch.bool).tril(-1)
    group = ((same & before).sum(1) + shift) // group_size
    causal = before | torch.eye(len(ids_N), dtype=torch.bool)
    return same & causal & (group[:, None] == group[None, :]) & (ids_N >= 0)[:, None]


def is_shifted(head: int, heads: int, kv_heads: int) -> bool:
    """The second half of the KV heads, query heads with theirs; of one KV head, of its queries."""
    if kv_heads == 1:
        return head >= (heads + 1) // 2
    return head * kv_heads // heads >= (kv_heads + 1) // 2


def dense(
    qkv: list[torch.Tensor], ids_BN: torch.Tensor, group_size: int, seed_BNHD: torch.Tensor
) -> list[torch.Tensor]:
    """`PARTS` by the definition: [B, N, H, D], then the gradients of q, k, v."""
    leaves = [x.detach().double().cpu().requires_grad_() for x in qkv]
    query, key, value = leaves
    heads, kv_heads = query.shape[1], key.shape[1]
    mask = torch.stack(
        [
            torch.stack(
                [
                    visible(ids, group_size, group_size // 2 * is_shifted(h, heads, kv_heads))
                    for h in range(heads)
                ]
            )
            for ids in ids_BN
        ]
    )
    key, value = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
    sees = mask.any(-1, keepdim=True)  # padding sees nothing, and its output is zero
    weights = scores.masked_fill(~mask & sees, -torch.inf).softmax(-1) * sees
    out = (weights @ value).transpose(1, 2)
    return [out.detach(), *torch.autograd.grad(out, leaves, seed_BNHD.double().cpu())]


def compare(case: Exact, device: str, length: int, head_dim: int = 64) -> dict[str, Any]:
    """Errors of one back end, whether they are allowed, and its kernels.

    Raises:
        NotHere: the back end is not installed.
    """
    if case.backend not in {"eager", *usable_backends(device)}:
        raise NotHere(f"{case.backend} is not available on this machine")
    dtype = getattr(torch, case.dtype)
    torch.manual_seed(0)
    ids = document_ids(case.rows, length)
    batch, group_size = len(ids), max(2, length // 8 * 2)
    qkv = [
        torch.randn(batch, length, heads, head_dim)
        .to(device, dtype)
        .transpose(1, 2)
        .requires_grad_()
        for heads in (case.heads, case.kv_heads, case.kv_heads)
    ]
    real = (ids >= 0)[:, :, None, None]
    seed = (torch.randn(batch, length, case.heads, head_dim) * real).to(device, dtype)
    call = AttentionCall(
        documents=from_ids(ids if case.rows != "plain" else None, None, batch=batch, length=length),
        runs=head_runs(S2, case.heads, case.kv_heads, group_size),
        group_size=group_size,
    )

    def step() -> list[torch.Tensor]:
        out = backend_for(case.backend)(*qkv, call)
        return [out.detach(), *torch.autograd.grad(out, qkv, seed)]

    got, wanted = step(), dense(qkv, ids, group_size, seed)
    got[0] = got[0] * real.to(device)  # what stands at padding, nobody reads
    errors = {
        part: ((a.double().cpu() - b).norm() / b.norm()).item()
        for part, a, b in zip(PARTS, got, wanted, strict=True)
    }
    allowed = ALLOWED[case.dtype] * (2 if case.backend == "eager" else 1)
    return {
        **errors,
        "right": all(error <= allowed for error in errors.values()),
        "kernels": kernel_names(step, device),
    }

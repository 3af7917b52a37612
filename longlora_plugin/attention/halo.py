"""S²-Attn of a shard: fetch the halo of keys and values, then attend as if nothing were split.

With its halo in front, a shard's keys are a row of their own whose segments need nothing else
(`shards.py`). One uneven all-to-all a layer brings the halos of all runs of heads; backward, the
reverse one takes their gradients back, where they are added. A layer that is recomputed exchanges
again, on every process alike: whether it does follows from the gathered row.

Shape suffixes: B rows, N tokens of a shard, H heads, h heads of a run, D head size; F rows that
keep a dimension of their own (`Row.folds`), T tokens of each, the other rows' in one line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import reduce
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from longlora_plugin.attention.call import AttentionCall
from longlora_plugin.attention.layout import HeadRun
from longlora_plugin.attention.rows import flatten, unflatten
from longlora_plugin.attention.sdpa import by_run
from longlora_plugin.attention.shards import OWN, Exchange, Layout, Row

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, AttentionCall], torch.Tensor]
"""A back end: (q_FhTD, k_FhTD, v_FhTD, call) → out_FThD."""


def sharded_attention(
    attend: Attend,
    q_BHND: torch.Tensor,
    k_BKND: torch.Tensor,
    v_BKND: torch.Tensor,
    call: AttentionCall,
    row: Row,
    group: dist.ProcessGroup,
) -> torch.Tensor:
    """S²-Attn of this process's tokens inside the whole row.

    Args:
        attend: the back end, which obeys `AttentionCall.pieces`.
        call: its documents do not count.

    Returns:
        [B, N, H, D]; padding is zero.
    """
    folds = row.folds

    def tokens_first(x_BhND: torch.Tensor) -> torch.Tensor:
        x_BNhD = x_BhND.transpose(1, 2)
        return x_BNhD if row.documents.are_rows else flatten(x_BNhD, row.local)[None]

    layouts = [
        row.layout(call.group_size, run.shift, call.full_attention_below) for run in call.runs
    ]
    split = by_run(call.runs, *map(tokens_first, (q_BHND, k_BKND, v_BKND)), dim=2)
    crossing = [i for i, layout in enumerate(layouts) if layout.crossing]
    keys = [[k, v] for _, _, k, v in split]
    if crossing:
        exchanged: Iterator[torch.Tensor] = iter(
            HaloExchange.apply(
                group,
                tuple(layouts[i] for i in crossing for _ in range(2)),
                *(x for i in crossing for x in keys[i]),
            )
        )
        for i in crossing:
            keys[i] = [next(exchanged), next(exchanged)]
    outputs = []
    for (run, q, _, _), (k, v), layout in zip(split, keys, layouts, strict=True):
        if not q.shape[1]:
            # Nothing to attend, yet backward must reach the exchange: others wait for it.
            nothing = (q.sum() + k.sum() + v.sum()) * 0
            outputs.append(q.new_zeros(folds, 0, q.shape[2], v.shape[-1]) + nothing)
            continue
        part = replace(
            call.of_run(run),
            documents=layout.documents,
            runs=(HeadRun(slice(0, q.shape[2]), slice(0, k.shape[2]), layout.shift),),
            full_attention_below=layout.full_attention_below,
            pieces=layout.pieces,
        )
        outputs.append(attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), part))
    out_FTHD = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
    return out_FTHD if row.documents.are_rows else unflatten(out_FTHD[0], row.local)


def exchange_of(
    row: Row, k_BKND: torch.Tensor, v_BKND: torch.Tensor, call: AttentionCall
) -> Exchange:
    """What a layer's forward pass exchanges for a row."""
    layouts = [
        row.layout(call.group_size, run.shift, call.full_attention_below) for run in call.runs
    ]
    width = (k_BKND.shape[-1] + v_BKND.shape[-1]) * k_BKND.element_size()
    heads = [run.kv.stop - run.kv.start for run in call.runs]
    processes, tokens = len(row.lengths), max(row.lengths)
    received = [
        row.folds
        * width
        * sum(h * layout.halos[rank] for h, layout in zip(heads, layouts, strict=True))
        for rank in range(processes)
    ]
    return Exchange(
        processes=processes,
        tokens=tokens,
        halo=max(max(layout.halos) for layout in layouts),
        hops=max(layout.hops for layout in layouts),
        received=max(received),
        ring=(processes - 1) * k_BKND.shape[0] * tokens * k_BKND.shape[1] * width,
    )


class HaloExchange(torch.autograd.Function):
    """(group, layouts, one tensor [F, T, h, D] each) → each with its halos in front of its pieces.

    Every process of the group calls it for the same layers in the same order, an empty shard, too.
    """

    @staticmethod
    def forward(
        ctx: Any, group: dist.ProcessGroup, layouts: tuple[Layout, ...], *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.group, ctx.layouts = group, layouts
        ctx.shapes = [x.shape for x in tensors]
        processes = range(len(layouts[0].sends))
        pairs = list(zip(tensors, layouts, strict=True))
        sent = [
            [x.narrow(1, *part) for x, layout in pairs for part in layout.sends[process]]
            for process in processes
        ]
        wanted = [
            [
                _resized(x.shape, tokens)
                for x, layout in pairs
                for source, tokens in layout.parts
                if source == process
            ]
            for process in processes
        ]
        arrived = [iter(each) for each in _exchange(sent, wanted, tensors, group)]
        extended = []
        for x, layout in pairs:
            own = iter(x.split([tokens for source, tokens in layout.parts if source == OWN], dim=1))
            parts = [
                next(own) if source == OWN else next(arrived[source]).to(x.dtype)
                for source, _ in layout.parts
            ]
            extended.append(torch.cat(parts, dim=1))
        return tuple(extended)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        processes = range(len(ctx.layouts[0].sends))
        returned: list[list[torch.Tensor]] = [[] for _ in processes]
        own = []
        for gradient, layout in zip(gradients, ctx.layouts, strict=True):
            mine: list[torch.Tensor] = []
            parts = gradient.split([tokens for _, tokens in layout.parts], dim=1)
            for (source, _), part in zip(layout.parts, parts, strict=True):
                (mine if source == OWN else returned[source]).append(part)
            own.append(torch.cat(mine, dim=1))
        wanted = [
            [
                _resized(shape, tokens)
                for shape, layout in zip(ctx.shapes, ctx.layouts, strict=True)
                for _, tokens in layout.sends[process]
            ]
            for process in processes
        ]
        arrived = _exchange(returned, wanted, gradients, ctx.group)
        for process, parts in zip(processes, map(iter, arrived), strict=True):
            for gradient, layout in zip(own, ctx.layouts, strict=True):
                for first, tokens in layout.sends[process]:
                    gradient.narrow(1, first, tokens).add_(next(parts))
        return None, None, *own


def _resized(shape: torch.Size, tokens: int) -> torch.Size:
    return torch.Size((shape[0], tokens, *shape[2:]))


def _exchange(
    sent: list[list[torch.Tensor]],
    wanted: list[list[torch.Size]],
    like: Sequence[torch.Tensor],
    group: dist.ProcessGroup,
) -> list[list[torch.Tensor]]:
    """One all-to-all: what each process is sent, and what comes from each."""
    dtype = reduce(torch.promote_types, (x.dtype for x in like))
    flat = [part.reshape(-1).to(dtype) for parts in sent for part in parts]
    outgoing = torch.cat(flat) if flat else like[0].new_empty(0, dtype=dtype)
    sizes = [[prod(shape) for shape in shapes] for shapes in wanted]
    incoming = outgoing.new_empty(sum(map(sum, sizes)))
    dist.all_to_all_single(
        incoming,
        outgoing,
        [sum(each) for each in sizes],
        [sum(part.numel() for part in parts) for parts in sent],
        group=group,
    )
    chunks = iter(incoming.split([size for each in sizes for size in each]))
    return [[next(chunks).view(shape) for shape in shapes] for shapes in wanted]


def with_dummy_queries(
    attend: Attend,
    q_FhTD: torch.Tensor,
    k_FhTD: torch.Tensor,
    v_FhTD: torch.Tensor,
    call: AttentionCall,
) -> torch.Tensor:
    """`attend` for kernels that need as many queries as keys: zeros stand for those of the halo,
    and what comes out for them is dropped. Causal attention of the others is the same.
    """
    if not any(halo for halo, _ in call.pieces):
        return attend(q_FhTD, k_FhTD, v_FhTD, call)
    own = q_FhTD.transpose(1, 2).split([tokens for _, tokens in call.pieces], dim=1)
    parts = [
        part
        for (halo, _), mine in zip(call.pieces, own, strict=True)
        for part in (mine.new_zeros(_resized(mine.shape, halo)), mine)
    ]
    out_FThD = attend(torch.cat(parts, dim=1).transpose(1, 2), k_FhTD, v_FhTD, call)
    kept = out_FThD.split([tokens for piece in call.pieces for tokens in piece], dim=1)[1::2]
    return kept[0] if len(kept) == 1 else torch.cat(kept, dim=1)

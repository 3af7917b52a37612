"""Tasks for `processes.py`: random rows over several processes against one, on tensors alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from itertools import accumulate, pairwise
from typing import Any
from unittest.mock import patch

import dense_attention
import numpy as np
import torch
import torch.distributed as dist

from longlora_plugin.attention import backends, shifted_sparse_attention, varlen
from longlora_plugin.attention.call import AttentionCall
from longlora_plugin.attention.gather import Shards
from longlora_plugin.attention.halo import exchange_of, sharded_attention
from longlora_plugin.attention.layout import S2, head_runs


@dataclass
class Traffic:
    """What collectives moved, as this process saw it."""

    exchanges: int = 0
    received: int = 0
    sent: int = 0
    sources: int = 0
    received_forward: int = 0
    gathers: list[int] = field(default_factory=list)


@contextmanager
def counted() -> Iterator[Traffic]:
    traffic = Traffic()
    exchange, gather = dist.all_to_all_single, dist.all_gather

    def all_to_all_single(out: Any, given: Any, outs: Any, ins: Any, **options: Any) -> Any:
        traffic.exchanges += 1
        traffic.received += sum(outs)
        traffic.sent += sum(ins)
        traffic.sources = max(traffic.sources, sum(map(bool, outs)))
        return exchange(out, given, outs, ins, **options)

    def all_gather(every: Any, x: torch.Tensor, **options: Any) -> Any:
        traffic.gathers.append(x.numel())
        return gather(every, x, **options)

    with (
        patch.object(dist, "all_to_all_single", all_to_all_single),
        patch.object(dist, "all_gather", all_gather),
    ):
        yield traffic


@dataclass(frozen=True)
class Case:
    """A batch of rows over some processes.

    Attributes:
        lengths: tokens of each process.
        documents: [row] → lengths of its documents, in order.
        padded: [row] → tokens of padding in front.
    """

    lengths: tuple[int, ...]
    documents: tuple[tuple[int, ...], ...]
    padded: tuple[int, ...]
    heads: int
    kv_heads: int
    head_dims: tuple[int, int]
    group_size: int
    full_attention_below: int
    backend: str


BACKENDS = ("sdpa", "eager", "flash_attention_2", "flex_attention", "torch_varlen")


def random_case(seed: int, processes: int) -> Case:
    rng = np.random.default_rng([seed, processes])
    group_size = 2 * int(rng.integers(1, 9))
    if rng.random() < 0.3:
        lengths = (int(rng.integers(1, 20)),) * processes
    elif rng.random() < 0.3:
        lengths = (group_size * int(rng.integers(1, 3)),) * processes
    else:
        lengths = tuple(
            int(n) for n in rng.integers(0, 25, processes) * rng.integers(0, 2, processes)
        )
    total, batch = sum(lengths), int(rng.choice([1, 1, 2, 3]))
    packs, pads = rng.random() < 0.5, rng.random() < 0.25
    documents, padded = [], []
    for index in range(batch):
        # Some row has a real token: of a batch without any, nobody looks at what comes out.
        padding = int(rng.integers(0, max(1, total + (index > 0)))) if pads else 0
        before = int(rng.integers(0, padding + 1))
        cuts = rng.integers(0, total - padding + 1, int(rng.integers(1, 6)) if packs else 0)
        edges = [0, *sorted(set(cuts.tolist()) - {0, total - padding}), total - padding]
        documents.append(tuple(b - a for a, b in pairwise(edges) if b > a))
        padded.append(before)
    kv_heads = int(rng.choice([1, 2, 3, 4]))
    head_dim = int(rng.choice([4, 8]))
    return Case(
        lengths, tuple(documents), tuple(padded), kv_heads * int(rng.integers(1, 4)), kv_heads,
        (head_dim, int(rng.choice([head_dim, 6]))), group_size,
        int(rng.choice([0, 0, 5, 17, 10_000])), BACKENDS[seed % len(BACKENDS)],
    )  # fmt: skip


def positions_of(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions and attention mask of whole rows, [B, N] both."""
    total = sum(case.lengths)
    positions = torch.zeros(len(case.documents), total, dtype=torch.long)
    mask = torch.zeros_like(positions)
    for row, (documents, before) in enumerate(zip(case.documents, case.padded, strict=True)):
        start = before
        for length in documents:
            positions[row, start : start + length] = torch.arange(length)
            mask[row, start : start + length] = 1
            start += length
    return positions, mask


def lower_right(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    longest_q: int,
    longest_k: int,
    scale: float,
) -> torch.Tensor:
    """What flash kernels compute: in each segment, the last query sees the last key."""
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert (cu_q[0], cu_k[0], cu_q[-1], cu_k[-1]) == (0, 0, len(q), len(k))
    assert (longest_q, longest_k) == (cu_q.diff().max(), cu_k.diff().max())
    assert cu_q.diff().min() > 0
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    i, j = torch.arange(len(q)), torch.arange(len(k))
    segment_q = torch.searchsorted(cu_q[1:], i, right=True)
    segment_k = torch.searchsorted(cu_k[1:], j, right=True)
    before_end = cu_q[1:][segment_q][:, None] - i[:, None] <= cu_k[1:][segment_k] - j
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    scores = scores.masked_fill((segment_q[:, None] != segment_k) | ~before_end, -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)


def flash_stand_in(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **given: Any) -> torch.Tensor:
    """transformers' `_flash_attention_forward`, by definition."""
    assert given["attention_mask"] is None
    assert given["is_causal"]
    cuts = [given[f"{name}_{x}"] for name in ("cu_seq_lens", "max_length") for x in "qk"]
    return lower_right(q[0], k[0], v[0], *cuts, given["softmax_scale"])[None]


def varlen_stand_in(*given: Any, scale: float, enable_gqa: bool = False, **_: Any) -> torch.Tensor:
    """`torch.nn.attention.varlen.varlen_attn`, by definition."""
    return lower_right(*given, scale)


def flex_stand_in(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, training: bool = False, **given: Any
) -> torch.Tensor:
    """`compile_friendly_flex_attention`, by its mask function."""
    assert q.shape[2] == k.shape[2]
    i, zero = torch.arange(q.shape[2]), torch.tensor(0)
    mask = given["block_mask"].mask_mod(zero, zero, i[:, None], i[None, :])
    return dense_attention.attention(q, k, v, mask[None], scale=given["scale"])


@contextmanager
def kernels(backend: str) -> Iterator[Any]:
    """The back end, with stand-ins for kernels that need a GPU; → a function."""
    with ExitStack() as stack:

        def replace(owner: str, name: str, function: Any) -> None:
            stack.enter_context(patch.object(import_module(owner), name, function))

        integrations = "transformers.integrations"
        if backend == "flash_attention_2":
            replace(f"{integrations}.flash_attention", "_flash_attention_forward", flash_stand_in)
        if backend == "flex_attention":
            name = "compile_friendly_flex_attention"
            replace(f"{integrations}.flex_attention", name, flex_stand_in)
        if backend == "torch_varlen":
            # What sdpa takes for packed and padded rows on a GPU.
            replace("torch.nn.attention.varlen", "varlen_attn", varlen_stand_in)
            takes = frozenset({"window_size", "scale", "enable_gqa"})
            replace(varlen.__name__, "_parameters_of_torch_varlen", lambda: takes)
            replace(backends.__name__, "torch_varlen_serves", lambda *_: True)
        yield backends.backend_for("sdpa" if backend == "torch_varlen" else backend)


def one_process(case: Case, qkv: list[torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
    """[B, N, H, D] of whole rows, zero at padding."""
    query, _, value = qkv
    out = query.new_zeros(*query.transpose(1, 2).shape[:3], value.shape[-1])
    out = out + 0 * sum(x.sum() for x in qkv)  # also of a row without tokens
    for row, documents in enumerate(case.documents):
        if not documents:
            continue
        real = mask[row].bool()
        attended = shifted_sparse_attention(
            *(x[row : row + 1, :, real] for x in qkv),
            group_size=case.group_size,
            full_attention_below=case.full_attention_below,
            cu_seqlens=torch.tensor([0, *accumulate(documents)], dtype=torch.int32),
        )
        out = out.index_put((torch.tensor(row), real.nonzero()[:, 0]), attended[0].transpose(0, 1))
    return out


def halo_elements(case: Case, rank: int) -> int:
    """Numbers that a process needs of others, token by token from the definition."""
    positions, mask = positions_of(case)
    first, end = sum(case.lengths[:rank]), sum(case.lengths[: rank + 1])
    half = case.group_size // 2
    kv_runs = (
        [(1, 0), (1, half)][: case.heads]
        if case.kv_heads == 1
        else [((case.kv_heads + 1) // 2, 0), (case.kv_heads // 2, half)]
    )
    total = 0
    for row, documents in enumerate(case.documents):
        mine = [i for i in range(first, end) if mask[row, i]]
        if not mine:
            continue
        position, start, length = int(positions[row, mine[0]]), case.padded[row], 0
        for length in documents:
            if start <= mine[0] < start + length:
                break
            start += length
        for kv_heads, shift in kv_runs:
            same = [
                p
                for p in range(position)
                if length <= case.full_attention_below
                or (p + shift) // case.group_size == (position + shift) // case.group_size
            ]
            total += len(same) * kv_heads * sum(case.head_dims)
    return total


@dataclass(frozen=True)
class Expected:
    """What a case comes to in one process.

    Attributes:
        output: [B, N, H, D] of whole rows.
        gradients: of the whole query, key and value, [B, heads, N, D].
        halos: of each process, numbers that it needs of others.
    """

    output: torch.Tensor
    gradients: list[torch.Tensor]
    halos: list[int]


def drawn(case: Case, seed: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Whole query, key and value, [B, heads, N, D], and the output's gradient [B, N, H, D]."""
    draw = torch.Generator().manual_seed(seed)
    batch, total, (key_dim, value_dim) = len(case.documents), sum(case.lengths), case.head_dims
    shapes = [(case.heads, key_dim), (case.kv_heads, key_dim), (case.kv_heads, value_dim)]
    whole = [
        torch.randn(batch, h, total, d, generator=draw, dtype=torch.float64) for h, d in shapes
    ]
    return whole, torch.randn(
        batch, total, case.heads, value_dim, generator=draw, dtype=torch.float64
    )


def expected(case: Case, seed: int) -> Expected:
    whole, weights = drawn(case, seed)
    out = one_process(case, [x.requires_grad_() for x in whole], positions_of(case)[1])
    (out * weights).sum().backward()
    halos = [halo_elements(case, rank) for rank in range(len(case.lengths))]
    return Expected(out.detach(), [x.grad for x in whole], halos)


def compare(
    group: dist.ProcessGroup, case: Case, seed: int, wanted: Expected, errors: dict[str, float]
) -> Traffic:
    """Outputs and gradients of this process's shard against one process; the worst in `errors`."""
    rank = dist.get_rank(group)
    first, end = sum(case.lengths[:rank]), sum(case.lengths[: rank + 1])
    positions, mask = positions_of(case)
    whole, weights = drawn(case, seed)
    shard = [x[:, :, first:end].clone().requires_grad_() for x in whole]
    shards = Shards(group)
    is_padded = bool((mask == 0).any())
    call = AttentionCall(
        documents=None,  # type: ignore[arg-type]
        runs=head_runs(S2, case.heads, case.kv_heads, case.group_size),
        group_size=case.group_size,
        full_attention_below=case.full_attention_below,
    )
    with counted() as traffic, kernels(case.backend) as attend:
        row = shards.gather(
            positions[:, first:end],
            mask[:, first:end] if is_padded else None,
            batch=len(case.documents),
            length=end - first,
            device=torch.device("cpu"),
        )
        out = sharded_attention(attend, *shard, call, row, group)
    if seed % 4 == 0:
        needed = max(wanted.halos)
        told = exchange_of(row, shard[1], shard[2], call)
        assert told.received == needed * shard[1].element_size()
        assert (told.processes, told.tokens) == (len(case.lengths), max(case.lengths))
        assert bool(told.halo) == bool(told.hops) == bool(needed)
    with counted() as backward:
        (out * weights[:, first:end]).sum().backward()
    assert backward.exchanges == traffic.exchanges
    assert (backward.sent, backward.received) == (traffic.received, traffic.sent)

    def note(name: str, found: torch.Tensor, expected: torch.Tensor) -> None:
        assert found.shape == expected.shape, (name, found.shape, expected.shape)
        worst = (found - expected).abs().max().item() if found.numel() else 0.0
        errors[name] = max(errors.get(name, 0.0), worst)

    note("output", out.detach(), wanted.output[:, first:end])
    for name, mine, gradient in zip(
        ("query", "key", "value"), shard, wanted.gradients, strict=True
    ):
        note(name, mine.grad, gradient[:, :, first:end])
    return traffic


def shared_out(group: dist.ProcessGroup, cases: dict[int, Case]) -> dict[int, Expected]:
    """`expected` of each seed's case, every process computing its part of them."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    mine = {seed: expected(cases[seed], seed) for seed in list(cases)[rank::size]}
    parts: list[Any] = [None] * size
    dist.all_gather_object(parts, mine, group=group)
    return {seed: each for part in parts for seed, each in part.items()}


def random_rows(group: dist.ProcessGroup, seeds: range) -> tuple[dict[str, float], Counter[str]]:
    """Compare many cases, and the elements that crossed; → worst errors, how many of each kind."""
    errors: dict[str, float] = {}
    kinds: Counter[str] = Counter()
    for first in range(0, len(seeds), 50):
        cases = {
            seed: random_case(seed, dist.get_world_size(group))
            for seed in seeds[first : first + 50]
        }
        wanted = shared_out(group, cases)
        for seed, case in cases.items():
            try:
                traffic = compare(group, case, seed, wanted[seed], errors)
            except Exception as error:
                raise AssertionError(f"seed {seed}, {case}: {error!r}") from error
            needed = wanted[seed].halos
            assert traffic.received == needed[dist.get_rank(group)], (seed, case, traffic, needed)
            assert traffic.exchanges == (1 if any(needed) else 0), (seed, case, traffic, needed)
            kinds.update(kinds_of(case, traffic, any(needed)))
    return errors, kinds


def kinds_of(case: Case, traffic: Traffic, crosses: bool) -> dict[str, int]:
    documents = case.documents
    return {
        "cases": 1,
        case.backend: 1,
        "nothing crosses": not crosses,
        "an empty shard": 0 in case.lengths,
        "uneven": len(set(case.lengths)) > 1,
        "a group above the shard": case.group_size > max(case.lengths),
        "packed": any(len(each) > 1 for each in documents),
        "one KV head": case.kv_heads == 1,
        "several rows": len(documents) > 1,
        "padded": any(sum(each) < sum(case.lengths) for each in documents),
        "a halo over several shards": traffic.sources > 1,
        "short documents": any(
            length <= case.full_attention_below for each in documents for length in each
        ),
    }

"""Who attends to whom in S²-Attn, as index arithmetic (LongLoRA, arXiv 2309.12307, section 3.2).

A *segment* is a run of consecutive tokens; a token attends to the tokens of its own segment that
are not after it. A document of L tokens with group size G and shift s is cut wherever (i + s) is
a multiple of G, so token i is in segment ⌊(i + s) / G⌋. Plain heads have s = 0, shifted heads
s = G/2. Segments never cross a document, hence nothing leaks: neither the future, nor another
packed document. This is the paper's Variant 2; rolling the tokens, its default, lets the first
G/2 tokens see the last G/2.

A *pattern* gives every KV head its shift. Query heads go with their KV head, so grouped-query
attention never repeats keys and values. With a single KV head the query heads are divided instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

from longlora_plugin.hookspecs import hookimpl

Segments = tuple[tuple[int, int], ...]
"""(first token, number of tokens) of each segment, in order, in flattened coordinates."""


@dataclass(frozen=True)
class AttentionPattern:
    """A segment pattern: one shift for each head.

    Attributes:
        name: what recipes write.
        shifts: function of (heads, group_size) → one shift per head, 0 ≤ shift < group_size.
            Heads of equal shift should be neighbours: each run of them is one kernel call.
        skips_positions: each segment's positions leave out a random stretch (`pose.py`); all
            shifts must be 0.
    """

    name: str
    shifts: Callable[[int, int], Sequence[int]]
    skips_positions: bool = False


@dataclass(frozen=True)
class HeadRun:
    """Neighbouring heads that share a shift: query heads and the KV heads that serve them."""

    query: slice
    kv: slice
    shift: int


def _half_shifted(heads: int, group_size: int) -> list[int]:
    plain = heads - heads // 2
    return [0] * plain + [group_size // 2] * (heads - plain)


S2 = AttentionPattern("s2", _half_shifted)
POSE = AttentionPattern("pose", lambda heads, group_size: [0] * heads, skips_positions=True)
PATTERNS = {pattern.name: pattern for pattern in (S2, POSE)}


@hookimpl
def longlora_attention_patterns() -> dict[str, AttentionPattern]:
    """The built-in patterns."""
    return dict(PATTERNS)


@lru_cache(maxsize=64)
def head_runs(
    pattern: AttentionPattern, heads: int, kv_heads: int, group_size: int
) -> tuple[HeadRun, ...]:
    """Divide the heads into runs of one shift.

    Args:
        heads, kv_heads: number of query heads and of KV heads, the first a multiple of the second.

    Raises:
        ValueError: the pattern does not give each head a shift below `group_size`.
    """
    shared = kv_heads == 1
    units, per_unit = (heads, 1) if shared else (kv_heads, heads // kv_heads)
    shifts = list(pattern.shifts(units, group_size))
    highest = 0 if pattern.skips_positions else group_size - 1
    if len(shifts) != units or not all(0 <= shift <= highest for shift in shifts):
        raise ValueError(
            f"attention pattern {pattern.name!r} returned {shifts} for {units} heads and group "
            f"size {group_size}; it must return {units} shifts from 0 to {highest}"
        )
    runs = []
    first = 0
    for shift, run in groupby(shifts):
        last = first + len(list(run))
        runs.append(
            HeadRun(
                query=slice(first * per_unit, last * per_unit),
                kv=slice(0, 1) if shared else slice(first, last),
                shift=shift,
            )
        )
        first = last
    return tuple(runs)


def ends(length: int, group_size: int, shift: int) -> tuple[int, int, int]:
    """A document of `length` tokens as (tokens before the first cut, whole groups, tokens left)."""
    lead = min(length, (group_size - shift) % group_size)
    groups, tail = divmod(length - lead, group_size)
    return lead, groups, tail


@lru_cache(maxsize=64)
def segments(
    documents: Segments, group_size: int, shift: int, full_attention_below: int
) -> Segments:
    """Cut documents into segments.

    Args:
        documents: (first token, tokens) of each document, none empty.
        full_attention_below: documents of up to this many tokens stay one segment.
    """
    cut: list[tuple[int, int]] = []
    for start, length in documents:
        if length <= full_attention_below:
            cut.append((start, length))
            continue
        lead, groups, tail = ends(length, group_size, shift)
        for size in (lead, *[group_size] * groups, tail):
            if size:
                cut.append((start, size))
                start += size
    return tuple(cut)


LOCAL_FREQUENCIES = ("dynamic", "longrope")
"""Types of RoPE that rows in shards cannot have: frequencies come from the largest position that a
process sees."""


def halo_tokens(shard: int, group_size: int, shift: int, rank: int) -> int:
    """Tokens of earlier processes that shard number `rank` needs for heads of one shift.

    Args:
        shard: tokens of a process.
    """
    return min((rank * shard + shift) % group_size, rank * shard)


def group_sizes_that_divide(shard: int) -> list[int]:
    """Even group sizes with no halo for plain heads: those that divide a shard, ascending."""
    small = [size for size in range(1, int(shard**0.5) + 1) if shard % size == 0]
    return sorted({size for each in small for size in (each, shard // each) if size % 2 == 0})

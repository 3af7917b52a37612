"""Rows that several processes share: each holds a contiguous shard of the tokens (context
parallelism). What a process needs of the others, as index arithmetic.

S²-Attn is local. Of other processes, a shard needs the keys and values from the start of the
segment that its first token lies in up to that token, its *halo*: at most G − 1 tokens.

    rank 0          rank 1          rank 2          G divides a shard:
    |-------|-------|-------|-------|-------|-----  plain heads, nothing crosses
    |---|-------|---<---|-------|---<---|-------|-  shifted heads, a halo of G/2 tokens

What a collective depends on is a function of the gathered row, which is the same on every process:
whether processes exchange, how much, and every error. None decides by its own shard, hence none
ever waits for one that does not come.

Shapes: B rows, N tokens of a whole row, n of a shard. *Flattened* as in `packing.py`, of the whole
row. *Pieces* are what a process holds of the token dimension, one for each row where rows are
flattened, one in all where every row is one document.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
import torch

from longlora_plugin.attention import packing
from longlora_plugin.attention.layout import Segments, segments
from longlora_plugin.attention.packing import PADDING, Documents

Bounds = tuple[tuple[tuple[int, int], ...], ...]
"""[process][piece] → (first token, end)."""

OWN = -1
"""In `Layout.parts`: tokens of the process itself."""


class Transfer(NamedTuple):
    """Tokens `first` to `end` of a piece that `source` sends to `target`."""

    source: int
    target: int
    piece: int
    first: int
    end: int


def transfers(bounds: Bounds, halos: Sequence[Sequence[int]]) -> tuple[Transfer, ...]:
    """Who sends which tokens to whom, by target, piece and source.

    Args:
        halos: [process][piece] → tokens before the first that it needs.
    """
    found = []
    for target, pieces in enumerate(bounds):
        for piece, (first, _) in enumerate(pieces):
            for source in range(target):
                start, end = bounds[source][piece]
                start, end = max(start, first - halos[target][piece]), min(end, first)
                if start < end:
                    found.append(Transfer(source, target, piece, start, end))
    return tuple(found)


class Exchange(NamedTuple):
    """What the forward pass of one layer exchanges, as the busiest process has it.

    Attributes:
        processes: that share a row.
        tokens: of its shard.
        halo: tokens that it gets of the processes before it, at most of all runs of heads.
        hops: how many processes before it the first of them comes from.
        received: bytes that it gets.
        ring: bytes that ring attention would bring it.
    """

    processes: int
    tokens: int
    halo: int
    hops: int
    received: int
    ring: int


@dataclass(frozen=True)
class Layout:
    """One process's part of a row, for heads of one shift.

    Attributes:
        pieces: (halo, own tokens) of each piece.
        documents, shift, full_attention_below: how keys, halo included, are cut into segments.
        sends: [process] → (first, tokens) of own tokens, counted over all pieces, that it needs.
        parts: (process or `OWN`, tokens) that keys consist of, in order.
        crossing: tokens that processes send each other, over all of them; equal on each.
        halos: [process] → tokens that it gets; equal on each.
        hops: how many processes before it a process gets tokens from, at most; equal on each.
    """

    pieces: tuple[tuple[int, int], ...]
    documents: Documents
    shift: int
    full_attention_below: int
    sends: tuple[Segments, ...]
    parts: tuple[tuple[int, int], ...]
    crossing: int
    halos: tuple[int, ...]
    hops: int


@dataclass(frozen=True)
class Row:
    """A whole batch of rows and what each process holds of it; the same on every process but for
    `rank` and `local`.

    Attributes:
        documents: of the whole rows.
        bounds: of each process: flattened, or inside a row where every row is one document.
        rank: this process.
        local: this process's tokens; only which are real counts.
        lengths: tokens of each process, padding included.
    """

    documents: Documents
    bounds: Bounds
    rank: int
    local: Documents
    lengths: tuple[int, ...]
    _layouts: dict[tuple[int, int, int], Layout] = field(
        default_factory=dict, compare=False, repr=False
    )

    @classmethod
    def of(cls, positions: Sequence[np.ndarray], rank: int) -> Row:
        """Read the positions [B, n] of each process, `PADDING` at padding.

        Raises:
            ValueError: positions are out of order.
        """
        whole = np.concatenate(positions, axis=1)
        _check_order(whole)
        batch, length = whole.shape
        mine = positions[rank]
        if (whole == PADDING).all():
            whole, mine = np.zeros_like(whole), np.zeros_like(mine)  # a dummy batch
        documents = packing.from_ids(
            torch.from_numpy(np.where(whole == PADDING, PADDING, 0)),
            torch.from_numpy(whole),
            batch=batch,
            length=length,
        )
        lengths = tuple(each.shape[1] for each in positions)
        ends = list(accumulate(lengths, initial=0))
        bounds: Bounds
        if documents.are_rows:
            bounds = tuple(((first, end),) for first, end in pairwise(ends))
        else:
            count = np.concatenate([[0], (whole != PADDING).ravel().cumsum()]).tolist()
            bounds = tuple(
                tuple((count[r * length + first], count[r * length + end]) for r in range(batch))
                for first, end in pairwise(ends)
            )
        kept = np.flatnonzero(mine != PADDING)
        real = None if len(kept) == mine.size else torch.from_numpy(kept)
        return cls(documents, bounds, rank, Documents(batch, mine.shape[1], (), real), lengths)

    @property
    def folds(self) -> int:
        """Rows that keep a dimension of their own: all where each is one document, or one."""
        return self.documents.batch if self.documents.are_rows else 1

    def layout(self, group_size: int, shift: int, full_attention_below: int) -> Layout:
        """What this process has, sends and receives for heads of one shift."""
        key = (group_size, shift, full_attention_below)
        if key not in self._layouts:
            self._layouts[key] = self._lay_out(*key)
        return self._layouts[key]

    def _lay_out(self, group_size: int, shift: int, full_attention_below: int) -> Layout:
        rows = self.documents.are_rows
        intervals = ((0, self.documents.length),) if rows else self.documents.intervals
        cut = segments(intervals, group_size, shift, full_attention_below)
        starts = [start for start, _ in cut]
        halos = [
            [first - _start_of(starts, first) if first < end else 0 for first, end in pieces]
            for pieces in self.bounds
        ]
        sent = transfers(self.bounds, halos)
        mine = self.bounds[self.rank]
        own = [end - first for first, end in mine]
        offsets = [0, *accumulate(own)]
        sends = tuple(
            tuple(
                (offsets[t.piece] + t.first - mine[t.piece][0], t.end - t.first)
                for t in sent
                if (t.source, t.target) == (self.rank, target)
            )
            for target in range(len(self.bounds))
        )
        parts: list[tuple[int, int]] = []
        for piece, tokens in enumerate(own):
            parts += [
                (t.source, t.end - t.first)
                for t in sent
                if (t.target, t.piece) == (self.rank, piece)
            ]
            parts.append((OWN, tokens))
        pieces = tuple(zip(halos[self.rank], own, strict=True))
        tokens = sum(map(sum, pieces))
        if rows:
            # The keys are a document that begins where the segment of the first token does.
            documents = packing.whole_rows(self.documents.batch, tokens)
            is_one = self.documents.length <= full_attention_below
            cuts = (0 if mine[0][0] > pieces[0][0] else shift, tokens if is_one else 0)
        else:
            documents = Documents(1, tokens, _clip(cut, starts, mine))
            cuts = (0, tokens)
        crossing = sum(t.end - t.first for t in sent)
        hops = max((t.target - t.source for t in sent), default=0)
        every = tuple(map(sum, halos))
        return Layout(pieces, documents, *cuts, sends, tuple(parts), crossing, every, hops)


def _start_of(starts: list[int], token: int) -> int:
    return starts[bisect_right(starts, token) - 1]


def _clip(cut: Segments, starts: list[int], pieces: Sequence[tuple[int, int]]) -> Segments:
    """The segments that pieces lie in, up to the end of each piece, moved together."""
    clipped: list[tuple[int, int]] = []
    offset = 0
    for first, end in pieces:
        index = bisect_right(starts, first) - 1
        while first < end and index < len(cut) and starts[index] < end:
            tokens = min(sum(cut[index]), end) - starts[index]
            clipped.append((offset, tokens))
            offset += tokens
            index += 1
    return tuple(clipped)


def _check_order(positions: np.ndarray) -> None:
    """Raise ValueError unless each row's real positions go on or start anew at 0."""
    for row, given in enumerate(positions):
        kept = np.flatnonzero(given != PADDING)
        # The first token comes after as many as there are in front of it, or starts at 0.
        steps, holes = np.diff(given[kept], prepend=-1), np.diff(kept, prepend=-1)
        wrong = np.flatnonzero((steps != 1) & (steps != holes) & (given[kept] != 0))
        if len(wrong):
            place = kept[wrong[0]]
            raise ValueError(
                f"token {place} of row {row} has position {given[place]}, which neither follows "
                "the token before nor starts a document at 0; shards must be contiguous and in the "
                "order of ranks. Split rows without zigzag (Axolotl: context_parallel: "
                "{load_balance: none})"
            )

"""What a back end is told of one attention, in addition to query, key and value."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from longlora_plugin.attention.layout import HeadRun, Segments, segments
from longlora_plugin.attention.packing import Documents


@dataclass(frozen=True)
class AttentionCall:
    """One S²-Attn of a batch; every back end is a function (q, k, v, call) → [B, N, H, D].

    Attributes:
        documents: where documents lie in the batch.
        runs: neighboring heads of one shift, in order; together all heads.
        group_size: tokens in a group.
        full_attention_below: documents of up to this many tokens are one segment.
        scale: factor on the scores; None is head_dim ** -0.5.
        dropout: share of attention weights that are dropped.
        softcap: bound of the scores, c · tanh(score / c); None is no bound.
        sinks_H: a score for each query head that takes part in the softmax without a value.
        module: the attention module that calls, where there is one.
        pieces: (keys that have no query in front, queries) of each stretch of the token dimension,
            where some keys come from other processes; empty: as many queries as keys.
    """

    documents: Documents
    runs: tuple[HeadRun, ...]
    group_size: int
    full_attention_below: int = 0
    scale: float | None = None
    dropout: float = 0.0
    softcap: float | None = None
    sinks_H: torch.Tensor | None = None
    module: torch.nn.Module | None = None
    pieces: tuple[tuple[int, int], ...] = ()

    def segments(self, run: HeadRun) -> Segments:
        """Segments of one run of heads, in flattened coordinates."""
        return segments(
            self.documents.intervals, self.group_size, run.shift, self.full_attention_below
        )

    def of_run(self, run: HeadRun) -> AttentionCall:
        """The call with the sinks of one run's heads."""
        if self.sinks_H is None:
            return self
        return replace(self, sinks_H=self.sinks_H[run.query])

    def with_scale(self, head_dim: int) -> AttentionCall:
        """The call with its scale written out, before heads of `head_dim` are padded."""
        return self if self.scale is not None else replace(self, scale=head_dim**-0.5)

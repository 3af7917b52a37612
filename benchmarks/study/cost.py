"""What a run's attention costs, counted: query-key pairs as a share of full causal attention's."""

from __future__ import annotations

import functools
import statistics
from dataclasses import replace

from benchmarks.study.settings import Settings
from benchmarks.study.sinks import allowed

HEADS, LAYERS = 8, 4


@functools.cache
def sparse_share(settings: Settings) -> float:
    """Pairs of one sparse layer over those of a full one."""
    if settings.attention == "full":
        return 1.0
    if settings.growing:
        sizes = [replace(settings, growing=(), group=group) for group in settings.growing]
        return statistics.fmean(map(sparse_share, sizes))
    group, length = settings.group, settings.target
    if settings.attention in ("groups", "pose"):
        whole, rest = divmod(length, group)
        pairs = whole * group * (group + 1) // 2 + rest * (rest + 1) // 2
        return pairs / (length * (length + 1) // 2)
    seen = allowed(HEADS, length, group, settings.sinks if settings.attention == "sinks" else 0)
    return float(seen.sum()) / (HEADS * length * (length + 1) / 2)


def attention_cost(settings: Settings, full_steps: int) -> float:
    """Mean over the run's steps and layers; `full_steps` of them use full attention.

    Short rows do too, and hold as many tokens a step.
    """
    sparse = sparse_share(settings)
    full_layers = len(settings.full_layers) / LAYERS
    of_sparse_step = full_layers + (1 - full_layers) * sparse
    full = full_steps / settings.steps
    long = full + (1 - full) * of_sparse_step
    short = settings.short_steps / settings.steps
    return short * (settings.short_rows + 1) / (settings.target + 1) + (1 - short) * long

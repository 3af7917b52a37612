"""S²-Attn over full attention and over its floor, each back end of this machine in turn.

FlexAttention is left out: it compiles for every length.
"""

from __future__ import annotations

import gc
import statistics
from typing import Any

import torch

from benchmarks.attention.measure import peak_bytes, take_turns, usable_backends
from benchmarks.attention.methods import Setup, steps
from benchmarks.gpu.cases import Attention, Size, section_of


def time_attention(case: Attention, size: Size, device: str, seconds: float) -> dict[str, Any]:
    """Medians of forward + backward in seconds and peaks in MiB, by method."""
    setup = Setup(
        heads=case.heads,
        head_dim=size.head_dim,
        device=device,
        dtype=torch.bfloat16,
        backends=tuple(b for b in usable_backends(device) if section_of(b) == "exact"),
        roll_up_to=0,
        floor_strides_of_modules=True,
    )
    group_size = case.length // 4
    methods = steps(case.length, [group_size], case.kv_heads, setup)
    for step in methods.values():  # plans and compilations
        step()
    peaks = {name: peak_bytes(step, device) / 2**20 for (name, _), step in methods.items()}
    turns = take_turns(methods, device, rounds=9, budget=seconds)
    medians = {name: statistics.median(taken) for (name, _), taken in turns.items()}
    del methods
    gc.collect()
    ours = [name for name in medians if name.startswith("s2 ")]
    return {
        "seconds": medians,
        "peak_mib": peaks,
        "over_full": {name: medians[name] / medians["full"] for name in ours},
        "over_floor": {name: medians[name] / medians["floor"] for name in ours},
    }

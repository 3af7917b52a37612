"""What ran on the device: names of kernels, the share of copies, waits."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.attention.measure import quiet_stderr

COPIES = ("copy", "memcpy", "catarray", "aten::cat", "index", "gather", "scatter", "transpose")
"""Parts of the names of kernels (and, on a CPU, operators) that only move what was computed."""


def device_times(step: Callable[[], Any], device: str) -> dict[str, float]:
    """Microseconds of each kernel of one step, most first; on a CPU of each operator."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities = [torch.profiler.ProfilerActivity.CUDA]
    with quiet_stderr(), torch.profiler.profile(activities=activities) as profile:
        step()
        if device == "cuda":
            torch.cuda.synchronize()
    times: Counter[str] = Counter()
    for event in profile.key_averages():
        # torch ≥ 2.4 says device time; operators repeat that of their kernels.
        spent = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
        if spent > 0:
            times[event.key] += spent
    return dict(times.most_common())


def kernel_names(step: Callable[[], Any], device: str, most: int = 4) -> list[str]:
    """The kernels that took longest."""
    return [name.split("(")[0][:90] for name in list(device_times(step, device))[:most]]


def copies_share(times: dict[str, float]) -> float:
    """Share of the time that went into moving data."""
    moved = sum(
        spent for name, spent in times.items() if any(word in name.lower() for word in COPIES)
    )
    return moved / max(sum(times.values()), 1e-9)


def waits(step: Callable[[], Any]) -> dict[str, int]:
    """Line of code → how often one step waits there for the GPU; CUDA only."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return dict(
        Counter(
            f"{warning.filename.rsplit('site-packages/', 1)[-1]}:{warning.lineno}"
            for warning in caught
            if "synchronizing" in str(warning.message)
        )
    )

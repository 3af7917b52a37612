"""Seconds and bytes of a step, on the machine at hand."""

from __future__ import annotations

import gc
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.attention.methods import Method, Step


def timed(step: Step, device: str) -> float:
    """Seconds of one step."""
    if device == "cpu":
        clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        start = clock()
        step()
        return clock() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def take_turns(
    methods: dict[Method, Step], device: str, rounds: int, budget: float
) -> dict[Method, list[float]]:
    """Seconds of each turn of each method: `rounds` turns, fewer (3 at least) beyond `budget`."""
    seconds: dict[Method, list[float]] = {method: [] for method in methods}
    start = time.perf_counter()
    for turn in range(rounds):
        if turn >= min(3, rounds) and time.perf_counter() - start > budget:
            break
        for method, step in methods.items():
            seconds[method].append(timed(step, device))
    return seconds


@contextmanager
def quiet_stderr() -> Iterator[None]:
    """Keep the profiler's start and stop lines, written by C++, off the terminal."""
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def peak_bytes(step: Step, device: str) -> int:
    """Most bytes that one step holds over what was allocated before it."""
    gc.collect()
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with (
        quiet_stderr(),
        torch.profiler.profile(activities=activities, profile_memory=True) as profile,
    ):
        step()
    kineto: Any = profile.profiler
    changes = sorted(
        (event.start_ns(), event.nbytes())
        for event in kineto.kineto_results.events()
        if event.name() == "[memory]"
    )
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


def usable_backends(device: str) -> list[str]:
    """Back ends of S² that this machine can run."""
    if device != "cuda":
        return ["sdpa"]
    from transformers.utils import (
        is_flash_attn_2_available,
        is_flash_attn_3_available,
        is_flash_attn_4_available,
    )

    flash = {
        "flash_attention_2": is_flash_attn_2_available,
        "flash_attention_3": is_flash_attn_3_available,
        "flash_attention_4": is_flash_attn_4_available,
    }
    return ["sdpa", "flex_attention", *[name for name, is_there in flash.items() if is_there()]]


def machine(device: str, dtype: str) -> str:
    """What the figures were measured on."""
    if device == "cuda":
        hardware = torch.cuda.get_device_name()
    else:
        cpuinfo = Path("/proc/cpuinfo")
        names = [
            line.split(":", 1)[1].strip()
            for line in (cpuinfo.read_text().splitlines() if cpuinfo.exists() else [])
            if line.startswith("model name")
        ]
        hardware = (
            f"{names[0] if names else platform.processor()} "
            f"({torch.get_num_threads()} of {len(names) or '?'} cores)"
        )
    return f"{hardware}, {dtype}, torch {torch.__version__}"

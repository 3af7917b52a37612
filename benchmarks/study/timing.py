"""Time of a training step with and without S²-Attn, measured alternately in one process."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.study.data import Books
from benchmarks.study.settings import Settings
from benchmarks.study.train import Attention, adapt, load, optimizer_of, step_of

ROUNDS = 9
"""Steps of each kind that count; one of each goes before."""


def alternate(model_dir: Path, books: Books) -> dict[str, Any]:
    """Seconds of a step of the main rows, medians, and the ratio of the two."""
    settings = Settings()
    model = adapt(load(model_dir, settings), settings)
    attention = Attention(model, settings)
    optimizer = optimizer_of(model, settings)
    ids = books.held_out_windows(settings.target, settings.tokens_a_step // settings.target)
    seconds: dict[str, list[float]] = {"s2": [], "full": []}
    for round_ in range(ROUNDS + 1):
        for kind, of_kind in seconds.items():
            attention.train(sparse=kind == "s2")
            started = time.perf_counter()
            step_of(model, optimizer, ids, ids)
            if round_:
                of_kind.append(time.perf_counter() - started)
    attention.remove()
    medians = {kind: statistics.median(of_kind) for kind, of_kind in seconds.items()}
    return {
        "seconds_a_step": medians,
        "tokens_a_second": {k: settings.tokens_a_step / v for k, v in medians.items()},
        "s2_over_full": medians["s2"] / medians["full"],
        "rounds": ROUNDS,
        "threads": torch.get_num_threads(),
    }

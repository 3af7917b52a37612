"""Passkey retrieval over a grid: one row for each model, length, depth and number of needles."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from longlora_plugin.evaluation.models import ModelSource
from longlora_plugin.evaluation.passkey import (
    DIGITS,
    DISTRACTORS,
    WORDING,
    By,
    Depth,
    Trial,
    answer_trials,
    build_trial,
    check_grid,
)
from longlora_plugin.evaluation.perplexity import BATCH_TOKENS
from longlora_plugin.evaluation.processes import Processes
from longlora_plugin.evaluation.results import Row, read_rows, settings_digest, write_rows

Cell = tuple[str, int, Depth, int]
"""Model, length, depth, needles."""


@dataclass(frozen=True)
class Grid:
    """What to ask.

    Attributes:
        lengths: tokens of prompt and answer at most.
        depths: shares of the filler before the needle, 0 … 1, or `random`.
        needles: how many numbers are hidden, each a row of its own.
        trials: questions a cell.
        by: `generate` or `likelihood`; see `passkey`.
        digits, distractors, seed: see `passkey.build_trial`.
        batch_size: prompts in a forward pass; None for as many as make `BATCH_TOKENS` tokens.
    """

    lengths: Sequence[int]
    depths: Sequence[Depth]
    needles: Sequence[int] = (1,)
    trials: int = 10
    by: By = "generate"
    digits: int = DIGITS
    distractors: int = DISTRACTORS
    seed: int = 0
    batch_size: int | None = None

    def batch_for(self, length: int) -> int:
        return self.batch_size or max(1, BATCH_TOKENS // length)


def ask(
    sources: Sequence[ModelSource],
    tokenizer: Any,
    grid: Grid,
    *,
    dtype: Any,
    processes: Processes,
    json_path: str | Path | None = None,
    on_note: Callable[[str], None] = lambda note: None,
    on_progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> list[Row]:
    """Ask every model every question.

    Args:
        sources: the models; loaded one at a time, and only where a row is missing.
        json_path: file of rows: those it has for the very same settings are kept, and it is
            written anew after each row.
        on_progress: told which model, the trials just done, and the trials in all.

    Raises:
        ValueError: the grid makes no sense, or a length is too short for a prompt.
    """
    for needles in grid.needles:
        check_grid(grid.lengths, grid.depths, needles, grid.digits, grid.distractors)
        for length in grid.lengths:  # too short a length is an error before a model loads
            _trial(tokenizer, grid, (length, grid.depths[0], needles), 0)
    described = {source.label: source.identity() for source in sources}
    cells: list[Cell] = [
        (source.label, length, depth, needles)
        for source in sources
        for needles in grid.needles
        for length in sorted(set(grid.lengths))
        for depth in grid.depths
    ]
    fingerprint = settings_digest({"ids": tokenizer(WORDING, verbose=False)["input_ids"]})
    settings = {
        cell: settings_digest(
            {
                **described[cell[0]],
                "cell": cell,
                "tokenizer": fingerprint,
                "dtype": str(dtype),
                "device": processes.device.partition(":")[0],
                **{
                    name: value
                    for name, value in asdict(grid).items()
                    if name not in ("lengths", "depths", "needles", "batch_size")
                },
            }
        )
        for cell in cells
    }
    kept = processes.from_main(read_rows(json_path) if processes.main else None)
    rows: dict[Cell, Row | None] = {cell: kept.get(settings[cell]) for cell in cells}
    missing = [cell for cell in cells if rows[cell] is None]
    if len(missing) < len(cells):
        on_note(f"{len(cells) - len(missing)} of {len(cells)} rows were already in {json_path}")

    def save() -> None:
        if json_path is not None and processes.main:
            write_rows(json_path, [row for row in rows.values() if row is not None])

    for source in sources:
        mine = [cell for cell in missing if cell[0] == source.label]
        if not mine:
            continue
        model = source.load(processes.device, dtype)
        asked = len(mine) * math.ceil(grid.trials / processes.count)
        for cell in mine:
            rows[cell] = _row(
                source,
                model,
                tokenizer,
                grid,
                cell,
                processes=processes,
                dtype=dtype,
                on_done=partial(_report, on_progress, source.label, asked),
            )
            rows[cell]["settings"] = settings[cell]  # type: ignore[index]
            save()
        del model
    save()
    return [row for row in rows.values() if row is not None]


def _trial(tokenizer: Any, grid: Grid, cell: tuple[int, Depth, int], number: int) -> Trial:
    length, depth, needles = cell
    return build_trial(
        tokenizer,
        length,
        depth,
        number,
        needles=needles,
        digits=grid.digits,
        distractors=grid.distractors,
        seed=grid.seed,
        answer_only=grid.by == "generate",
    )


def _report(
    on_progress: Callable[[str, int, int], None], label: str, total: int, done: int
) -> None:
    on_progress(label, done, total)


def _row(
    source: ModelSource,
    model: Any,
    tokenizer: Any,
    grid: Grid,
    cell: Cell,
    *,
    processes: Processes,
    dtype: Any,
    on_done: Callable[[int], None],
) -> Row:
    label, length, depth, needles = cell
    started = time.perf_counter()
    own = range(processes.rank, grid.trials, processes.count)
    trials = [_trial(tokenizer, grid, (length, depth, needles), number) for number in own]
    right: list[bool] = []
    for answers in answer_trials(
        model,
        tokenizer,
        trials,
        by=grid.by,
        batch_size=grid.batch_for(length),
        device=processes.device,
    ):
        right += answers
        on_done(len(answers))
    found = processes.gather(
        [
            (number, answer, trial.tokens, trial.depth)
            for number, answer, trial in zip(own, right, trials, strict=True)
        ]
    )
    found.sort()
    correct = sum(answer for _, answer, _, _ in found)
    return {
        "model": label,
        "length": length,
        "depth": depth,
        "needles": needles,
        "accuracy": correct / grid.trials,
        "correct": correct,
        "trials": grid.trials,
        "ci95": list(wilson(correct, grid.trials)),
        "by": grid.by,
        "chance": 1 / (grid.distractors + 1) if grid.by == "likelihood" else 10.0**-grid.digits,
        "digits": grid.digits,
        "distractors": grid.distractors if grid.by == "likelihood" else None,
        "seed": grid.seed,
        "tokens_least": min(tokens for _, _, tokens, _ in found),
        "tokens_most": max(tokens for _, _, tokens, _ in found),
        "answers": [
            {"depth": round(at, 4), "tokens": tokens, "right": answer}
            for _, answer, tokens, at in found
        ],
        "weights": source.weights,
        "adapter": None if source.adapter is None else str(source.adapter),
        "rope_parameters": source.rope,
        "attention": "full",
        "dtype": str(dtype).removeprefix("torch."),
        "device": processes.device,
        "processes": processes.count,
        "seconds": round(time.perf_counter() - started, 3),
    }


def wilson(correct: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's 95 % interval of a share: sound for few trials, and at 0 and 100 %."""
    share = correct / trials
    middle = share + z * z / (2 * trials)
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def groups_of(rows: Sequence[Row]) -> Iterator[tuple[str, int, list[Row]]]:
    """Rows by model and number of needles, in their order."""
    for label, needles in dict.fromkeys((row["model"], row["needles"]) for row in rows):
        yield (
            label,
            needles,
            [row for row in rows if (row["model"], row["needles"]) == (label, needles)],
        )

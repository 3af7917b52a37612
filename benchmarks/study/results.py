"""The rows that were measured, read back and averaged over seeds."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.study.cost import attention_cost
from benchmarks.study.plan import QUESTIONS, Question, Row
from benchmarks.study.settings import Settings

BYTES_A_TOKEN = 437360 / 154416
"""Of the held-out books in the bundled tokenizer."""

Measured = dict[str, Any]
"""One run's JSON file."""


@dataclass(frozen=True)
class Value:
    """A figure over the seeds that were run.

    Attributes:
        of_seed: seed → figure.
    """

    of_seed: dict[int, float]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.of_seed.values())

    @property
    def low(self) -> float:
        return min(self.of_seed.values())

    @property
    def high(self) -> float:
        return max(self.of_seed.values())

    def text(self, digits: int = 2) -> str:
        """`35.21 (35.02–35.40)`: mean and range, where the two differ."""
        mean, low, high = (f"{x:.{digits}f}" for x in (self.mean, self.low, self.high))
        return mean if low == high else f"{mean} ({low}–{high})"


class Results:
    """The measured runs, `rows/*.json` of a folder, and `timing.json` where it is there."""

    def __init__(self, out: Path) -> None:
        self.rows: dict[str, Measured] = {}
        for path in sorted((out / "rows").glob("*.json")):
            self.rows[path.stem] = json.loads(path.read_text())
        timing = out / "timing.json"
        self.timing = json.loads(timing.read_text()) if timing.is_file() else None

    def of(self, row: Row) -> dict[int, Measured]:
        """seed → what was measured, of the runs that are there."""
        return {
            settings.seed: self.rows[settings.key]
            for settings in row.runs()
            if settings.key in self.rows
        }

    def value(self, row: Row, figure: Callable[[Measured], float]) -> Value | None:
        """A figure of a row over its seeds, None where no run is there."""
        found = {seed: figure(measured) for seed, measured in self.of(row).items()}
        return Value(found) if found else None

    def row(self, question: str, label: str) -> Row:
        """A row by the name of its question and its label."""
        return next(row for row in self.question(question).rows if row.label == label)

    @staticmethod
    def question(name: str) -> Question:
        return next(question for question in QUESTIONS if question.name == name)

    def missing(self) -> int:
        wanted = {s.key for q in QUESTIONS for row in q.rows for s in row.runs()}
        return len(wanted - set(self.rows))


def a_token(measured: Measured, perplexity: float) -> float:
    """Perplexity a token of the bundled tokenizer, also where the text was read as bytes."""
    bytes_ = measured["settings"]["task"] == "recall"
    return float(perplexity) ** (BYTES_A_TOKEN if bytes_ else 1)


def perplexity(measured: Measured) -> float:
    return a_token(measured, measured["perplexity"])


def at(bucket: str) -> Callable[[Measured], float]:
    """Perplexity in a bucket of positions; `first` and `last` are its names too."""

    def figure(measured: Measured) -> float:
        by_position = measured["by_position"]
        names = list(by_position)
        name = {"first": names[0], "last": names[-1]}.get(bucket, bucket)
        return a_token(measured, by_position[name])

    return figure


def evaluated_sparse(measured: Measured) -> float:
    """NaN where the run had no sparse attention."""
    return float(measured.get("evaluated_sparse", {}).get("perplexity", "nan"))


def retrieved(length: int) -> Callable[[Measured], float]:
    """Share of the digits found in windows of a length, in percent."""
    return lambda measured: 100 * float(measured["retrieval"]["digits"][str(length)])


def retrieved_far(measured: Measured) -> float:
    """Share of the digits found more than half the target length back, in percent."""
    return 100 * float(measured["retrieval"]["far"])


def short(measured: Measured) -> float:
    """Perplexity in windows of the base model's own context, where ×32 was measured."""
    return a_token(measured, measured["short"]["perplexity"])


def recalled(distance: str) -> Callable[[Measured], float]:
    """Share of the facts recalled in the longest windows, in percent, by distance or of `all`."""

    def figure(measured: Measured) -> float:
        found = measured["recall"]
        if distance == "all":
            return 100 * float(list(found["within"].values())[-1])
        return 100 * float(found["by_distance"][distance])

    return figure


def at_step(step: int) -> Callable[[Measured], float]:
    """Perplexity while a run went on."""
    return lambda measured: float(measured["watched"][str(step)]["perplexity"])


def seconds_a_step(measured: Measured) -> float:
    return float(measured["seconds"]) / int(measured["settings"]["steps"])


def tokens_a_second(measured: Measured) -> float:
    return float(measured["settings"]["tokens_a_step"]) / seconds_a_step(measured)


def cost(settings: Settings) -> float:
    """Attention's query-key pairs as a share of full attention's, over the run."""
    from benchmarks.study.train import full_attention_steps

    return attention_cost(settings, len(full_attention_steps(settings)))

"""The rows of a build's data files."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longlora_plugin.longqa.journal import Journal, Rows, line_of, row_name, validation_path
from longlora_plugin.longqa.quality import NearDuplicates
from longlora_plugin.longqa.settings import Report
from longlora_plugin.longqa.units import Composer, Unit
from longlora_plugin.longqa.wordings import SPECIAL_TOKENS, as_row, as_trained, row_texts


class Writer:
    """Turns recorded units into rows, in order, each row once."""

    def __init__(
        self,
        composer: Composer,
        journal: Journal,
        report: Report,
        out: Path,
        short: Sequence[dict[str, Any]],
    ) -> None:
        self.composer, self.journal, self.report = composer, journal, report
        self.rows = {
            "train": Rows(out),
            "validation": Rows(validation_path(out)),
        }
        self.pairs = NearDuplicates(composer.settings.similar)
        for entry in journal.steps["unit"].values():
            for pair in entry["pairs"]:
                if pair["row"] in self.rows[entry["split"]].names:
                    self.pairs.repeats(pair["row"], _says(pair))
        self.short = self._short_lines(short)
        self.short_used = 0
        self.gave: set[str] = set()

    def write(self, unit: Unit, entry: dict[str, Any]) -> None:
        report, rows = self.report, self.rows[unit.split]
        report.dropped.update(entry["dropped"])
        if entry["pairs"]:
            report.barren.pop(unit.document.name, None)
            self.gave.add(unit.document.name)
        elif unit.document.name not in self.gave:
            why = entry.get("why") or "; ".join(f"{n} {why}" for why, n in entry["dropped"].items())
            report.barren[unit.document.name] = why or "the model asked nothing about it"
        for pair in entry["pairs"]:
            if pair["row"] not in rows.names:
                if self.pairs.repeats(pair["row"], _says(pair)):
                    report.dropped["near-duplicate"] += 1
                    continue
                text = self.composer.instruction(unit, pair["question"])
                rows.append(line_of(as_row(self.composer.settings.layout, text, pair["answer"])))
            report.pairs[unit.split] += 1
            report.tasks[pair["task"]] += 1
            if unit.split == "train":
                self._mix_in()

    def _mix_in(self) -> None:
        """Add short rows until they have their share of the training rows."""
        share = self.composer.settings.short_share
        due = int(self.report.pairs["train"] * share / (1 - share) + 1e-9)
        while self.short_used < min(due, len(self.short)):
            line, tokens = self.short[self.short_used]
            self.short_used += 1
            name = row_name(line)
            if name not in self.journal.steps["short"]:
                self.journal.write("short", name, tokens)
            if name not in self.rows["train"].names:
                self.rows["train"].append(line)
            self.report.pairs["short"] += 1

    def _short_lines(self, short: Sequence[dict[str, Any]]) -> list[tuple[bytes, int]]:
        composer, settings = self.composer, self.composer.settings
        if not settings.short_share:
            return []
        texts = [row_texts(row) for row in short]
        sizes = composer.count(
            [as_trained(settings.layout, *text, composer.tokenizer) for text in texts]
        )
        found: dict[bytes, int] = {}
        for text, size in zip(texts, sizes, strict=True):
            if size + SPECIAL_TOKENS > settings.context:
                self.report.dropped["short instruction longer than the context"] += 1
            else:
                found[line_of(as_row(settings.layout, *text))] = size + SPECIAL_TOKENS
        ordered = sorted(found.items())
        random.Random(composer.number("short")).shuffle(ordered)
        return ordered


def _says(pair: dict[str, Any]) -> str:
    """What two pairs are compared by: not the question's wording, which many pairs share."""
    if pair["task"] == "model":
        return f"{pair['question']}\n{pair['answer']}"
    return "\n".join([pair["task"], pair["answer"], *pair["evidence"]])

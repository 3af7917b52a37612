"""A unit is one window of one document; here its pairs become rows that fit the context."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from longlora_plugin.longqa import tasks
from longlora_plugin.longqa.documents import KINDS, Document
from longlora_plugin.longqa.endpoint import PROMPT_TOKENS
from longlora_plugin.longqa.journal import line_of, row_name
from longlora_plugin.longqa.quality import has_evidence
from longlora_plugin.longqa.sections import Count, Window
from longlora_plugin.longqa.settings import Settings
from longlora_plugin.longqa.wordings import (
    SPECIAL_TOKENS,
    as_row,
    as_trained,
    frame_texts,
    phrase,
)

SMALLEST_WINDOW = 64
"""Tokens that must be left for the document, or no question can be asked about it."""

# A wrong estimate where texts meet must not push a row over the context.
_SLACK = 8


@dataclass(frozen=True)
class Unit:
    """One window of one document: what one request asks about."""

    document: Document
    window: Window
    split: str
    name: str


def token_count(tokenizer: Any) -> Count:
    """Counts tokens of texts with a transformers tokenizer, without special tokens."""
    # Its warning about long texts is about running a model, not about counting.
    tokenizer.model_max_length = int(1e30)

    def count(texts: Sequence[str]) -> list[int]:
        if not texts:
            return []
        found = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False)
        return [len(ids) for ids in found["input_ids"]]

    return count


class Composer:
    """Makes pairs of a unit into what is recorded: checked, phrased and measured.

    Args:
        settings: what decides the rows.
        tokenizer: a transformers tokenizer; measures everything.

    Raises:
        ValueError: the context leaves no space for a document.
    """

    def __init__(self, settings: Settings, tokenizer: Any) -> None:
        self.settings, self.tokenizer = settings, tokenizer
        self.count = token_count(tokenizer)
        self.window_budget = self._window_budget()

    def _window_budget(self) -> int:
        """Tokens of a window so that the longest wording, question and answer still fit."""
        frames = [
            as_trained(self.settings.layout, text, "", self.tokenizer)
            for kind in KINDS
            for text in frame_texts(kind)
        ]
        context = self.settings.context
        frame = max(self.count(frames)) + SPECIAL_TOKENS + _SLACK
        if self.settings.model:
            pair = min(context // 2, self.settings.answer_tokens + 100)
        else:
            pair = min(context // 4, 1024)
        left = context - frame - pair
        if left < SMALLEST_WINDOW:
            raise ValueError(
                f"--context {context} leaves {max(0, left)} tokens for the document: the wording "
                f"takes {frame}, question and answer up to {pair}; "
                f"write at least --context {2 * (frame + SMALLEST_WINDOW)}"
            )
        return left

    def split_of(self, document: Document) -> str:
        """`train` or `validation`: whole documents are set apart."""
        share = self.number("split", document.digest) / 2**64
        return "validation" if share < self.settings.validation_share else "train"

    def number(self, *parts: object) -> int:
        """A number of 64 bits that depends on the seed and on `parts` alone."""
        joined = "|".join(str(part) for part in (self.settings.seed, *parts))
        return int.from_bytes(hashlib.sha256(joined.encode()).digest()[:8], "big")

    def from_text(self, unit: Unit) -> dict[str, Any]:
        """What is recorded of a unit whose pairs are made without a model."""
        settings = self.settings
        material = tasks.Material(unit.window, settings.language)
        rng = random.Random(self.number("tasks", unit.name))
        pairs = tasks.make_pairs(material, settings.questions, rng, settings.tasks)
        entry = self.entry(unit, pairs)
        return entry if pairs else {**entry, "why": tasks.why_none(material, settings.tasks)}

    def entry(
        self, unit: Unit, pairs: Sequence[tasks.Pair], spent: tuple[int, int] | None = None
    ) -> dict[str, Any]:
        """What is recorded of a finished unit: pairs that passed, and why others did not."""
        dropped: Counter[str] = Counter()
        kept = []
        for pair in pairs:
            if has_evidence(pair.evidence, unit.window.text, self.settings.evidence_edits):
                kept.append(pair)
            else:
                dropped["evidence not in the document"] += 1
        texts = [self.instruction(unit, pair.question) for pair in kept]
        layout = self.settings.layout
        trained = [
            as_trained(layout, text, pair.answer, self.tokenizer)
            for text, pair in zip(texts, kept, strict=True)
        ]
        recorded = []
        for pair, text, size in zip(kept, texts, self.count(trained), strict=True):
            if size + SPECIAL_TOKENS > self.settings.context:
                dropped["longer than the context"] += 1
                continue
            line = line_of(as_row(layout, text, pair.answer))
            recorded.append(
                {
                    "row": row_name(line),
                    "task": pair.task,
                    "tokens": size + SPECIAL_TOKENS,
                    "question": pair.question,
                    "answer": pair.answer,
                    "evidence": list(pair.evidence),
                }
            )
        found: dict[str, Any] = {
            "document": unit.document.digest,
            "name": unit.document.name,
            "kind": unit.document.kind,
            "split": unit.split,
            "window": unit.window.index,
            "pairs": recorded,
            "dropped": dict(dropped),
        }
        if spent is not None:
            found["spent"] = list(spent)
        return found

    def instruction(self, unit: Unit, question: str) -> str:
        """The instruction of a row: one wording for a unit and question, always the same."""
        rng = random.Random(self.number("wording", unit.name, question))
        return phrase(unit.document.kind, unit.window.text, question, rng)

    def estimate(self, unit: Unit) -> tuple[int, int]:
        """(prompt, completion) tokens that asking about a unit may take at most."""
        answers = self.settings.questions * self.settings.answer_tokens
        return unit.window.tokens + PROMPT_TOKENS, answers

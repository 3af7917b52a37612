"""What decides a build, and what it reports."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from longlora_plugin.longqa import tasks
from longlora_plugin.longqa.endpoint import ANSWER_TOKENS
from longlora_plugin.longqa.quality import SIMILAR
from longlora_plugin.longqa.wordings import LAYOUTS

EXIT_DONE, EXIT_NOTHING, EXIT_INCOMPLETE = 0, 1, 3
EXIT_ENDPOINT, EXIT_BUDGET, EXIT_DISK, EXIT_INTERRUPTED = 4, 5, 6, 130
"""Exit codes of a build; 2 is click's for wrong options."""


@dataclass(frozen=True)
class Settings:
    """What decides the rows; a build goes on only with the settings that it began with.

    Attributes:
        context: tokens of a row as it is trained, question and answer and prompt included.
        seed: of every choice.
        layout: one of wordings.LAYOUTS.
        questions: pairs asked for in each window.
        tasks: which tasks may be used (no model).
        kind: of every document; None: judged for each.
        language: ISO 639 code, for finding sentences.
        validation_share: share of documents whose rows go to the validation file.
        short_share: share of the training rows that are short instructions.
        model: name at the endpoint; None: tasks from the text.
        answer_tokens: longest answer of a model, in tokens.
        evidence_edits: characters by which a quote may differ from the document.
        similar: Jaccard similarity from which two pairs count as one.
    """

    context: int
    seed: int = 0
    layout: str = "alpaca"
    questions: int = 6
    tasks: tuple[str, ...] = tuple(tasks.TASKS)
    kind: str | None = None
    language: str = "en"
    validation_share: float = 0.0
    short_share: float = 0.0
    model: str | None = None
    answer_tokens: int = ANSWER_TOKENS
    evidence_edits: int = 0
    similar: float = SIMILAR

    def __post_init__(self) -> None:
        unknown = sorted(set(self.tasks) - set(tasks.TASKS))
        if unknown:
            raise ValueError(f"unknown task {unknown[0]!r}; valid: {', '.join(tasks.TASKS)}")
        if self.layout not in LAYOUTS:
            raise ValueError(f"unknown layout {self.layout!r}; valid: {', '.join(LAYOUTS)}")
        for name in ("validation_share", "short_share"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"--{name.replace('_', '-')} {getattr(self, name)} must be at least 0 and "
                    "below 1, for example 0.1"
                )


@dataclass
class Report:
    """What a build did; the counts are over all of its runs.

    Attributes:
        documents: documents read.
        skipped: file → why it gave no document.
        duplicates: file → the earlier file that it nearly repeats.
        windows: windows of all documents.
        left_out: sentences that alone exceed the context.
        pairs: rows by file: `train`, `validation`, `short` (part of the training file).
        tasks: rows by task.
        dropped: pairs kept out, by reason.
        failed: units that an endpoint gave nothing for, by reason.
        to_ask: units not built yet; of a dry run only.
        tokens: (prompt, completion) spent; in a dry run: at most to be spent.
        cost: of those tokens; None without prices.
        stopped: why the build ended early; None where it did not.
        exit_code: one of the EXIT_ constants.
    """

    documents: int = 0
    skipped: dict[str, str] = field(default_factory=dict)
    duplicates: dict[str, str] = field(default_factory=dict)
    windows: int = 0
    left_out: int = 0
    pairs: Counter[str] = field(default_factory=Counter)
    tasks: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    to_ask: int = 0
    tokens: tuple[int, int] = (0, 0)
    cost: float | None = None
    stopped: str | None = None
    exit_code: int = EXIT_DONE

    def as_json(self) -> dict[str, Any]:
        """Plain values, for `--json`."""
        # Not asdict, which cannot copy a Counter.
        return dict(vars(self))

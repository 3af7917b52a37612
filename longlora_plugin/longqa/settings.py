"""What decides a build, and what it reports."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from longlora_plugin.longqa.documents import KINDS
from longlora_plugin.longqa.options import option
from longlora_plugin.longqa.quality import SIMILAR
from longlora_plugin.longqa.tasks import TASKS
from longlora_plugin.longqa.wordings import LAYOUTS

EXIT_DONE, EXIT_NOTHING, EXIT_INCOMPLETE = 0, 1, 3
EXIT_ENDPOINT, EXIT_BUDGET, EXIT_DISK, EXIT_INTERRUPTED = 4, 5, 6, 130
"""Exit codes of a build; 2 is click's for wrong options."""


@dataclass(frozen=True)
class Settings:
    """What decides the rows; a build goes on only with the settings that it began with.

    Every field but `context`, `short_share` and `model` is the option that its help describes.
    """

    context: int
    seed: int = option(0, "Seed of every choice.")
    layout: str = option(
        "alpaca", "Rows have instruction and output, or messages.", choices=LAYOUTS
    )
    questions: int = option(6, "Pairs for each window.", min=1)
    tasks: tuple[str, ...] = option(
        tuple(TASKS),
        "Use only this task; may be repeated.",
        flag="task",
        choices=tuple(TASKS),
        repeatable=True,
    )
    kind: str | None = option(
        None, "Kind of every document; without it each is judged.", choices=KINDS
    )
    language: str = option(
        "en", "ISO 639 code, for abbreviations; sentence ends are known for every script."
    )
    validation_share: float = option(
        0.0,
        "Share of documents set apart; their rows go to OUT.validation.jsonl.",
        min=0,
        below=1,
    )
    short_share: float = 0.0
    model: str | None = None
    answer_tokens: int = option(300, "Longest answer of a model.", min=1)
    evidence_edits: int = option(
        0, "Characters by which a model's quote may differ from the document.", min=0
    )
    similar: float = option(
        SIMILAR,
        "Jaccard similarity from which two pairs count as one; above 1, all are kept.",
        flag="near-duplicates",
        min=0.3,
        max=2,
    )


@dataclass
class Report:
    """What a build did; the counts are over all of its runs.

    Attributes:
        documents: documents read.
        skipped: file → why it gave no document.
        duplicates: file → the earlier file that it nearly repeats.
        barren: document that gave no pairs → why.
        windows: windows of all documents.
        left_out: sentences that alone exceed the context.
        pairs: rows by file: `train`, `validation`, `short` (part of the training file).
        tasks: rows by task.
        dropped: pairs kept out, by reason.
        failed: units that an endpoint gave nothing for, by reason.
        to_ask: units not built yet; of a dry run only.
        tokens: (prompt, completion) spent; in a dry run: at most to be spent.
        stopped: why the build ended early; None where it did not.
        exit_code: one of the EXIT_ constants.
    """

    documents: int = 0
    skipped: dict[str, str] = field(default_factory=dict)
    duplicates: dict[str, str] = field(default_factory=dict)
    barren: dict[str, str] = field(default_factory=dict)
    windows: int = 0
    left_out: int = 0
    pairs: Counter[str] = field(default_factory=Counter)
    tasks: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    to_ask: int = 0
    tokens: tuple[int, int] = (0, 0)
    stopped: str | None = None
    exit_code: int = EXIT_DONE

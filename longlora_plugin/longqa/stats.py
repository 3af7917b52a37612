"""What a finished LongQA file holds: pairs, kinds, lengths, and what a recipe should be told."""

from __future__ import annotations

import hashlib
import statistics
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longlora_plugin.longqa.journal import Journal, provenance_path, row_name
from longlora_plugin.longqa.row_files import read_rows
from longlora_plugin.longqa.units import token_count
from longlora_plugin.longqa.wordings import SPECIAL_TOKENS, as_trained, row_texts

CONTEXTS = (1024, 2048, 4096, 8192, 16384, 32768, 65536, 102400)
"""Context sizes above which shares are given, in tokens."""

EARLY = 0.1
"""Answers whose evidence is in this first share of the text count as early."""

EARLY_SHARE = 0.5
DOMINANT_SHARE = 0.5
_BATCH = 16


@dataclass
class Described:
    """One row, as far as it can be known.

    Attributes:
        tokens: as trained; None without a tokenizer and without a record.
        characters: of instruction and output.
        depth: where the last of the evidence (else the answer) is in the instruction, 0 to 1;
            None where none of it is there word for word.
    """

    file: str
    name: str
    kind: str
    task: str
    document: str
    tokens: int | None
    characters: int
    depth: float | None


@dataclass
class Statistics:
    """What one file holds, or several together.

    Attributes:
        pairs: rows, of `files`.
        files: paths.
        kinds, tasks: pairs by kind of document and by task; `unknown` without a record.
        documents: how many the pairs are about.
        largest_document: (name, pairs) of the one with most pairs.
        unit: of the lengths: `tokens`, or `characters` where tokens are not known.
        lengths: `min`, `median`, `mean`, `p95`, `max` and `total`.
        above: share of pairs longer than each of CONTEXTS; empty in characters.
        depths: answers by the tenth of the text that their evidence is in.
        damaged: place of a line that is no row → why.
        warnings: what would make training on the rows a waste.
    """

    pairs: int = 0
    files: list[str] = field(default_factory=list)
    kinds: dict[str, int] = field(default_factory=dict)
    tasks: dict[str, int] = field(default_factory=dict)
    documents: int = 0
    largest_document: tuple[str, int] | None = None
    unit: str = "tokens"
    lengths: dict[str, float] = field(default_factory=dict)
    above: dict[str, float] = field(default_factory=dict)
    depths: list[int] = field(default_factory=list)
    damaged: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


@dataclass
class OfFiles(Statistics):
    """What several files hold together, and each of them.

    Attributes:
        by_file: the same keys for each file, and `file`, its path.
    """

    by_file: list[dict[str, Any]] = field(default_factory=list)


def describe(path: Path, tokenizer: Any = None) -> tuple[list[Described], dict[str, str]]:
    """Every row of a data file, and the lines that are no rows with the reason.

    Args:
        tokenizer: a transformers tokenizer; None: lengths from the record next to the file.

    Raises:
        ValueError: the file cannot be read, or its record is damaged.
    """
    known = _record(path)
    count = token_count(tokenizer) if tokenizer is not None else None
    rows: list[Described] = []
    pending: list[tuple[Described, str]] = []
    damaged: dict[str, str] = {}
    for where, line, row in read_rows(path):
        if isinstance(row, str):
            damaged[f"{path}, {where}"] = row.split("\n")[0][:160]
            continue
        asked, answered = row_texts(row)
        name = row_name(line)
        facts = known.get(name, {})
        described = Described(
            file=str(path),
            name=name,
            kind=facts.get("kind", "unknown"),
            task=facts.get("task", "unknown"),
            document=facts.get("document") or _document_of(asked),
            tokens=facts.get("tokens"),
            characters=len(asked) + len(answered),
            depth=_depth(asked, facts.get("evidence") or [answered]),
        )
        rows.append(described)
        if count is not None:
            layout = "chat" if "messages" in row else "alpaca"
            pending.append((described, as_trained(layout, asked, answered, tokenizer)))
        if len(pending) == _BATCH:
            _measure(pending, count)
    _measure(pending, count)
    return rows, damaged


def _measure(pending: list[tuple[Described, str]], count: Any) -> None:
    if pending:
        for (row, _), size in zip(pending, count([text for _, text in pending]), strict=True):
            row.tokens = size + SPECIAL_TOKENS
        pending.clear()


def _record(path: Path) -> dict[str, dict[str, Any]]:
    """Row name → kind, task, document, tokens, evidence; empty without a record."""
    if not provenance_path(path).exists():
        return {}
    journal = Journal(path)
    known: dict[str, dict[str, Any]] = {
        name: {"kind": "short", "task": "short", "tokens": tokens}
        for name, tokens in journal.steps["short"].items()
    }
    for unit in journal.steps["unit"].values():
        for pair in unit["pairs"]:
            known[pair["row"]] = {
                "kind": unit["kind"],
                "document": unit["name"],
                **{key: pair[key] for key in ("task", "tokens", "evidence")},
            }
    return known


def _document_of(asked: str) -> str:
    # Wordings and questions differ, the document's longest paragraph does not; this tells two
    # windows of one document apart, which only the record could join.
    longest = max(asked.split("\n"), key=len)
    return "text " + hashlib.sha256(longest.encode("utf-8", "replace")).hexdigest()[:8]


def _depth(asked: str, quotes: Iterable[str]) -> float | None:
    places = [place for quote in quotes if quote and (place := asked.find(quote)) >= 0]
    return max(places) / max(1, len(asked)) if places else None


def summarize(
    rows: list[Described],
    damaged: dict[str, str] | None = None,
    *,
    sequence_len: int | None = None,
) -> Statistics:
    """Statistics of rows, with warnings about what would make training on them a waste.

    Args:
        sequence_len: of the recipe that will train on them, in tokens.
    """
    known = [row.tokens for row in rows if row.tokens is not None]
    in_tokens = bool(rows) and len(known) == len(rows)
    lengths = sorted(known if in_tokens else [row.characters for row in rows])
    by_document = Counter(row.document for row in rows if row.kind != "short")
    result = Statistics(
        pairs=len(rows),
        files=sorted({row.file for row in rows}),
        kinds=dict(Counter(row.kind for row in rows).most_common()),
        tasks=dict(Counter(row.task for row in rows).most_common()),
        documents=len(by_document),
        largest_document=by_document.most_common(1)[0] if by_document else None,
        unit="tokens" if in_tokens else "characters",
        lengths=_spread(lengths),
        damaged=damaged or {},
    )
    if in_tokens:
        result.above = {
            str(size): sum(length > size for length in lengths) / len(lengths) for size in CONTEXTS
        }
    depths = [row.depth for row in rows if row.depth is not None and row.kind != "short"]
    result.depths = [
        sum(min(9, int(depth * 10)) == tenth for depth in depths) for tenth in range(10)
    ]
    result.warnings = _warnings(result, rows, depths, sequence_len)
    return result


def _spread(lengths: list[int]) -> dict[str, float]:
    if not lengths:
        return {}
    return {
        "min": lengths[0],
        "median": statistics.median(lengths),
        "mean": round(statistics.fmean(lengths), 1),
        "p95": lengths[min(len(lengths) - 1, int(len(lengths) * 0.95))],
        "max": lengths[-1],
        "total": sum(lengths),
    }


def _warnings(
    result: Statistics, rows: list[Described], depths: list[float], sequence_len: int | None
) -> list[str]:
    found = []
    if not rows:
        return ["there are no pairs"]
    if result.damaged:
        where, why = next(iter(result.damaged.items()))
        found.append(f"{len(result.damaged)} lines are no rows; the first: {where}: {why}")
    early = sum(depth <= EARLY for depth in depths)
    if len(depths) >= 10 and early > EARLY_SHARE * len(depths):
        found.append(
            f"{early} of {len(depths)} answers are in the first {EARLY:.0%} of their text: "
            "training on them teaches to read the beginning only"
        )
    if result.largest_document and result.documents > 1:
        name, pairs = result.largest_document
        long_pairs = sum(row.kind != "short" for row in rows)
        if pairs > DOMINANT_SHARE * long_pairs:
            found.append(f"one document dominates: {name} has {pairs} of {long_pairs} pairs")
    elif result.documents == 1:
        found.append("all pairs are about one document: a model may learn it by heart")
    twice = len(rows) - len({row.name for row in rows})
    if twice:
        found.append(f"{twice} rows are there more than once, word for word")
    if sequence_len is not None and result.unit == "tokens":
        longer = sum((row.tokens or 0) > sequence_len for row in rows)
        if longer:
            found.append(
                f"{longer} of {len(rows)} pairs are longer than sequence_len: {sequence_len}; "
                "Axolotl drops or cuts them (excess_length_strategy); raise it to "
                f"{int(result.lengths['max'])}, or build with --context {sequence_len}"
            )
    elif sequence_len is not None:
        found.append(
            "lengths in tokens are unknown, so sequence_len cannot be checked; add --tokenizer PATH"
        )
    return found


def draw(rows: list[Described], path: Path, *, sequence_len: int | None = None) -> None:
    """A PNG with two histograms: lengths of the pairs, and the depth of their answers."""
    from matplotlib.figure import Figure

    summary = summarize(rows)
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    in_tokens = summary.unit == "tokens"
    for kind in summary.kinds:
        values = [
            (row.tokens or 0) if in_tokens else row.characters for row in rows if row.kind == kind
        ]
        top = max(1, int(summary.lengths["max"]))
        left.hist(values, bins=40, range=(0, top), alpha=0.6, label=f"{kind} ({len(values)})")
    if sequence_len is not None and in_tokens:
        left.axvline(
            sequence_len, color="black", linestyle="--", label=f"sequence_len {sequence_len}"
        )
    left.set(xlabel=f"length of a pair [{summary.unit}]", ylabel="pairs", title="Lengths")
    left.legend()
    right.bar([tenth * 10 + 5 for tenth in range(10)], summary.depths, width=9)
    right.set(
        xlabel="where the answer's last evidence is [% of the instruction]",
        ylabel="pairs",
        title="Depth of the answers",
        xlim=(0, 100),
    )
    figure.savefig(path, dpi=120)

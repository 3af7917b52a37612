"""Tables for the terminal: one function a kind of result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

from rich.table import Table

from longlora_plugin.evaluation.results import Row

HOLDS_WITHIN = 1.1
"""Perplexity over that at the base model's context up to which a model holds."""


def labels_of(rows: Sequence[Row]) -> list[str]:
    """The models of some rows, in their order."""
    return list(dict.fromkeys(row["model"] for row in rows))


def lengths_of(rows: Sequence[Row]) -> list[int]:
    """The lengths of some rows, rising."""
    return sorted({row["length"] for row in rows})


def length_table(rows: Sequence[Row]) -> Table:
    """Models × lengths: perplexity."""
    first = rows[0]
    mode = (
        "each token scored once"
        if first["score"] == "new"
        else "every token of every window scored (the original script's average)"
    )
    strides = sorted({row["stride"] for row in rows})
    caption = (
        f"{mode}; {first['data']}: {first['documents']} document(s); stride "
        f"{', '.join(map(str, strides))}; ± half of the 95 % bootstrap interval"
        + (f" over {first['ci_over']}" if first["ci_over"] else "")
    )
    return _by_length(_table("Perplexity by context length", caption), rows, "model", _perplexity)


def byte_table(rows: Sequence[Row]) -> Table:
    """Models × lengths: bits a byte, which compare where tokenizers differ."""
    caption = (
        "the models have different tokenizers, so that their perplexities count different tokens: "
        "compare these"
    )
    return _by_length(_table("Bits per byte by context length", caption), rows, "model", _bits)


def depth_tables(rows: Sequence[Row]) -> list[Table]:
    """A table of depths × lengths for each model."""
    return [
        _by_length(
            _table(
                f"Passkey accuracy: {label}",
                f"{group[0]['trials']} trials a cell; greedy decoding, exact match; seed "
                f"{group[0]['seed']}",
            ),
            group,
            "depth",
            lambda row: f"{row['accuracy']:.0%}",
            mean=lambda rows, length: f"{_mean(rows, length, 'accuracy'):.0%}",
        )
        for label, group in _by_model(rows)
    ]


def bench_tables(rows: Sequence[Row]) -> list[Table]:
    """A table of tasks × lengths for each model, in percent, with the mean of each length."""
    caption = "score in percent ± standard error; *: some prompts were cut to the length"
    return [
        _by_length(
            _table(f"Benchmarks: {label}", caption),
            group,
            "task",
            _percent,
            mean=lambda rows, length: f"{100 * mean_score(rows, length):.1f}",
        )
        for label, group in _by_model(rows)
    ]


def _table(title: str, caption: str) -> Table:
    return Table(
        title=title,
        caption=caption,
        title_justify="left",
        caption_justify="left",
        title_style="bold",
        min_width=60,
    )


def _by_length(
    table: Table,
    rows: Sequence[Row],
    key: str,
    cell: Callable[[Row], str],
    mean: Callable[[Sequence[Row], int], str] | None = None,
) -> Table:
    """A line for each value of `key`, a column for each length, and the mean of each column."""
    lengths = lengths_of(rows)
    table.add_column(key)
    for length in lengths:
        table.add_column(_heading(length, rows[0]), justify="right")
    longest_first = sorted(rows, key=lambda row: -row["length"])  # it has most tasks
    values = list(dict.fromkeys(row[key] for row in longest_first))
    for value in values:
        found = {row["length"]: row for row in rows if row[key] == value}
        cells = (cell(found[length]) if length in found else "–" for length in lengths)
        table.add_row(depth_label(value) if key == "depth" else value, *cells)
    if mean and len(values) > 1:
        table.add_section()
        table.add_row("mean", *(mean(rows, length) for length in lengths))
    return table


def _heading(length: int, row: Row) -> str:
    if length == row.get("base_context"):
        return f"{length}\n(original)"
    return f"{length}\n(target)" if length == row.get("target_context") else str(length)


def _by_model(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    return [(label, [row for row in rows if row["model"] == label]) for label in labels_of(rows)]


def bucket_table(rows: Sequence[Row]) -> Table:
    """Position buckets × models at the longest length."""
    longest = [row for row in rows if row["length"] == lengths_of(rows)[-1]]
    first = longest[0]
    table = _table(
        f"Perplexity by position, windows of {first['length']} tokens",
        "position: tokens seen before the predicted one; the base model's context "
        f"{first['base_context']}",
    )
    table.add_column("position", justify="right")
    for row in longest:
        table.add_column(row["model"], justify="right")
    for index, bucket in enumerate(first["buckets"]):
        inside = bucket["to"] <= first["base_context"]
        table.add_row(
            f"{bucket['from']}–{bucket['to']}",
            *(_number(row["buckets"][index]["perplexity"]) for row in longest),
            style="" if inside else "bold",
        )
    return table


def verdicts(rows: Sequence[Row]) -> list[str]:
    """A sentence for each model: how far its perplexity holds, in windows of the longest length.

    It holds up to a position while no bucket from the base model's context on is more than
    `HOLDS_WITHIN` above the last one inside. Empty where the windows do not go beyond that context.
    """
    found = []
    for row in (each for each in rows if each["length"] == lengths_of(rows)[-1]):
        known = [bucket for bucket in row["buckets"] if bucket["perplexity"]]
        inside = [bucket for bucket in known if bucket["to"] <= row["base_context"]]
        beyond = [bucket for bucket in known if bucket["to"] > row["base_context"]]
        if not inside or not beyond:
            continue
        at, base = inside[-1]["to"], inside[-1]["perplexity"]
        ratios = [(bucket["to"], bucket["perplexity"] / base) for bucket in beyond]
        lost = next((place for place, (_, r) in enumerate(ratios) if r > HOLDS_WITHIN), None)
        to, ratio = ratios[-1]
        if lost is None:
            found.append(f"{row['model']} holds to {to}: {ratio:.2f} × its perplexity at {at}")
        else:
            holds = at if lost == 0 else ratios[lost - 1][0]
            found.append(
                f"{row['model']} does not hold beyond {holds}: {ratio:.2f} × its perplexity at "
                f"{at} by {to}"
            )
    return found


def mean_score(rows: Sequence[Row], length: int) -> float:
    """Mean over the tasks of one length."""
    return _mean(rows, length, "score")


def _mean(rows: Sequence[Row], length: int, key: str) -> float:
    return fmean(row[key] for row in rows if row["length"] == length)


def effective_length(rows: Sequence[Row], threshold: float) -> int | None:
    """RULER's effective length of one model: the longest whose mean score is at the threshold.

    Lengths at which a task has no row are left out: means over different tasks do not compare.
    """
    tasks = {row["task"] for row in rows}
    whole = [
        length
        for length in lengths_of(rows)
        if {row["task"] for row in rows if row["length"] == length} == tasks
    ]
    return max((length for length in whole if mean_score(rows, length) >= threshold), default=None)


def _percent(row: Row) -> str:
    error = "" if row["stderr"] is None else f" ± {100 * row['stderr']:.1f}"
    return f"{100 * row['score']:.1f}{error}{'*' if row['truncated'] else ''}"


def depth_label(depth: Any) -> str:
    """A depth as a percentage, or `random`."""
    return str(depth) if depth == "random" else f"{depth:.0%}"


def _perplexity(row: Row) -> str:
    text = _number(row["perplexity"])
    if row["ci95"]:
        low, high = row["ci95"]
        text += f" ± {_number((high - low) / 2)}"
    return text


def _bits(row: Row) -> str:
    return "–" if row["bits_per_byte"] is None else f"{row['bits_per_byte']:.4f}"


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.2f}" if value < 1000 else f"{value:,.0f}" if value < 1e6 else f"{value:.2g}"


def tokens_label(value: float) -> str:
    """A number of tokens; 8k for 8192."""
    return f"{value / 1024:g}k" if value >= 4096 and value % 1024 == 0 else f"{value:g}"

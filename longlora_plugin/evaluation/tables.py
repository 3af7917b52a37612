"""Tables for the terminal: one function a kind of result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from longlora_plugin.evaluation.results import Row

TABLE: dict[str, Any] = {
    "title_justify": "left",
    "caption_justify": "left",
    "title_style": "bold",
    "min_width": 60,
}
HOLDS_WITHIN = 1.1
"""Perplexity over that at the base model's context up to which a model holds."""
LIGHTEST = (247, 240, 228)
DARKEST = (33, 102, 112)
"""Shades of 0 and of 100 %."""


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
    table = Table(title="Perplexity by context length", **TABLE)
    strides = sorted({row["stride"] for row in rows})
    table.caption = (
        f"{mode}; {first['data']}: {first['documents']} document(s); stride "
        f"{', '.join(map(str, strides))}; ± half of the 95 % bootstrap interval"
        + (f" over {first['ci_over']}" if first["ci_over"] else "")
    )
    return _models_by_length(table, rows, _with_interval)


def byte_table(rows: Sequence[Row]) -> Table:
    """Models × lengths: bits a byte, which compare where tokenizers differ."""
    table = Table(title="Bits per byte by context length", **TABLE)
    table.caption = (
        "the models have different tokenizers, so that their perplexities count different tokens: "
        "compare these"
    )
    return _models_by_length(
        table,
        rows,
        lambda row: "–" if row["bits_per_byte"] is None else f"{row['bits_per_byte']:.4f}",
    )


def _models_by_length(table: Table, rows: Sequence[Row], cell: Callable[[Row], str]) -> Table:
    table.add_column("model")
    for length in lengths_of(rows):
        table.add_column(_marked(length, rows[0]), justify="right")
    for label in labels_of(rows):
        found = (_row(rows, label, length) for length in lengths_of(rows))
        table.add_row(label, *("–" if row is None else cell(row) for row in found))
    return table


def bucket_table(rows: Sequence[Row]) -> Table:
    """Position buckets × models at the longest length."""
    longest = [row for row in rows if row["length"] == lengths_of(rows)[-1]]
    first = longest[0]
    table = Table(
        title=f"Perplexity by position, windows of {first['length']} tokens",
        caption="position: tokens seen before the predicted one; the base model's context "
        f"{first['base_context']}",
        **TABLE,
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


def depth_tables(rows: Sequence[Row]) -> list[Table]:
    """A table of depths × lengths for each model."""
    tables = []
    for label in labels_of(rows):
        group = [row for row in rows if row["model"] == label]
        first = group[0]
        table = Table(
            title=f"Passkey accuracy: {label}",
            caption=f"{first['trials']} trials a cell; greedy decoding, exact match; seed "
            f"{first['seed']}",
            **TABLE,
        )
        table.add_column("depth", justify="right")
        for length in lengths_of(group):
            table.add_column(str(length), justify="right")
        for depth in dict.fromkeys(row["depth"] for row in group):
            cells = [_cell(group, length, depth) for length in lengths_of(group)]
            table.add_row(depth_label(depth), *cells)
        if len({row["depth"] for row in group}) > 1:
            table.add_section()
            table.add_row("mean", *(f"{_mean(group, n):.0%}" for n in lengths_of(group)))
        tables.append(table)
    return tables


def bench_tables(rows: Sequence[Row]) -> list[Table]:
    """A table of tasks × lengths for each model, in percent, with the mean of each length."""
    tables = []
    for label in labels_of(rows):
        group = [row for row in rows if row["model"] == label]
        table = Table(
            title=f"Benchmarks: {label}",
            caption="score in percent ± standard error; *: some prompts were cut to the length",
            **TABLE,
        )
        table.add_column("task")
        for length in lengths_of(group):
            table.add_column(str(length), justify="right")
        longest_first = sorted(group, key=lambda row: -row["length"])  # it has most tasks
        for task in dict.fromkeys(row["task"] for row in longest_first):
            found = {row["length"]: row for row in group if row["task"] == task}
            cells = (found.get(length) for length in lengths_of(group))
            table.add_row(task, *("–" if row is None else _percent(row) for row in cells))
        if len({row["task"] for row in group}) > 1:
            table.add_section()
            means = (mean_score(group, length) for length in lengths_of(group))
            table.add_row("mean", *(f"{100 * mean:.1f}" for mean in means))
        tables.append(table)
    return tables


def mean_score(rows: Sequence[Row], length: int) -> float:
    """Mean over the tasks of one length."""
    scores = [row["score"] for row in rows if row["length"] == length]
    return float(sum(scores) / len(scores))


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


def _find(rows: Sequence[Row], length: int, depth: Any) -> Row | None:
    return next((r for r in rows if r["length"] == length and r["depth"] == depth), None)


def accuracy(rows: Sequence[Row], length: int, depth: Any) -> float:
    """Accuracy of one cell; NaN where it has no row."""
    row = _find(rows, length, depth)
    return float("nan") if row is None else float(row["accuracy"])


def _cell(rows: Sequence[Row], length: int, depth: Any) -> Text:
    row = _find(rows, length, depth)
    if row is None:
        return Text("–")
    share = row["accuracy"]
    shade = ",".join(
        str(round(light + share * (dark - light)))
        for light, dark in zip(LIGHTEST, DARKEST, strict=True)
    )
    ink = "white" if share > 0.55 else "black"
    return Text(f" {share:.0%} ", style=f"{ink} on rgb({shade})")


def _mean(rows: Sequence[Row], length: int) -> float:
    shares = [row["accuracy"] for row in rows if row["length"] == length]
    return sum(shares) / len(shares)


def depth_label(depth: Any) -> str:
    """A depth as a percentage, or `random`."""
    return str(depth) if depth == "random" else f"{depth:.0%}"


def _row(rows: Sequence[Row], label: str, length: int) -> Row | None:
    return next((r for r in rows if r["model"] == label and r["length"] == length), None)


def _marked(length: int, row: Row) -> str:
    if length == row["base_context"]:
        return f"{length}\n(original)"
    return f"{length}\n(target)" if length == row["target_context"] else f"{length}\n"


def _with_interval(measure: dict[str, Any]) -> str:
    text = _number(measure["perplexity"])
    if measure["ci95"]:
        low, high = measure["ci95"]
        text += f" ± {_number((high - low) / 2)}"
    return text


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.2f}" if value < 1000 else f"{value:,.0f}" if value < 1e6 else f"{value:.2g}"


def tokens_label(value: float) -> str:
    """A number of tokens; 8k for 8192."""
    return f"{value / 1024:g}k" if value >= 4096 and value % 1024 == 0 else f"{value:g}"

"""Tables for the terminal and pictures of perplexity by context length and position."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from longlora_plugin.evaluation.results import Row

COLORS = ("#4a5568", "#dd8452", "#2b6cb0", "#2f855a", "#805ad5", "#b83280")
"""Line colours in the order of models: base, base+rope, what was trained, others."""

PLOT_DPI = 160

TABLE: dict[str, Any] = {
    "title_justify": "left",
    "caption_justify": "left",
    "title_style": "bold",
    "min_width": 60,
}


def labels_of(rows: Sequence[Row]) -> list[str]:
    """The models of some rows, in their order."""
    return list(dict.fromkeys(row["model"] for row in rows))


def lengths_of(rows: Sequence[Row]) -> list[int]:
    """The lengths of some rows, rising."""
    return sorted({row["length"] for row in rows})


def length_table(rows: Sequence[Row], *, key: str = "perplexity") -> Table:
    """Models × lengths; with `key` "long_ppl" LongPPL instead of perplexity."""
    first = rows[0]
    mode = (
        "each token scored once"
        if first["score"] == "new"
        else "every token of every window scored (the original script's average)"
    )
    title = "Perplexity by context length"
    if key == "long_ppl":
        title = "LongPPL by context length"
        mode = f"key tokens only, found by {first['long_ppl']['evaluator']}"
    table = Table(title=title, **TABLE)
    strides = sorted({row["stride"] for row in rows})
    table.caption = (
        f"{mode}; {first['data']}: {first['documents']} document(s); stride "
        f"{', '.join(map(str, strides))}; ± half of the 95 % bootstrap interval"
        + (f" over {first['ci_over']}" if first["ci_over"] and key == "perplexity" else "")
    )
    table.add_column("model")
    for length in lengths_of(rows):
        table.add_column(_marked(length, first), justify="right")
    for label in labels_of(rows):
        cells = []
        for length in lengths_of(rows):
            row = _row(rows, label, length)
            measure = row if row is None or key == "perplexity" else row[key]
            cells.append("–" if measure is None else _with_interval(measure))
        table.add_row(label, *cells)
    return table


def bucket_table(rows: Sequence[Row]) -> Table:
    """Position buckets × models at the longest length."""
    longest = [row for row in rows if row["length"] == lengths_of(rows)[-1]]
    first = longest[0]
    table = Table(
        title=f"Perplexity by position, windows of {first['length']} tokens",
        caption="position: tokens seen before the predicted one; original context "
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


def plot_positions(rows: Sequence[Row], path: str | Path, *, title: str | None = None) -> None:
    """Draw perplexity by position at the longest length, one line a model, as a PNG.

    Buckets stand at their geometric middle; the original context is marked.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

    longest = [row for row in rows if row["length"] == lengths_of(rows)[-1]]
    first = longest[0]
    figure, axes = pyplot.subplots(figsize=(8, 4.6), layout="constrained")
    axes.axvspan(first["base_context"], first["length"], color="#f7f3e8", zorder=0)
    axes.axvline(first["base_context"], color="#a08c5b", linewidth=1.2, linestyle=(0, (4, 3)))
    for index, row in enumerate(longest):
        points = [bucket for bucket in row["buckets"] if bucket["perplexity"] is not None]
        color = COLORS[index % len(COLORS)]
        axes.plot(
            [_middle(bucket) for bucket in points],
            [bucket["perplexity"] for bucket in points],
            color=color,
            linewidth=2,
            marker="o",
            markersize=4.5,
            markeredgecolor="white",
            markeredgewidth=0.8,
            label=row["model"],
        )
    values = [b["perplexity"] for row in longest for b in row["buckets"] if b["perplexity"]]
    axes.set_xscale("log", base=2)
    left = min(_middle(bucket) for bucket in first["buckets"]) / 1.15
    axes.set_xlim(left, first["length"] * 1.02)
    # Where a model falls apart beyond its context, a linear scale would flatten all the others.
    if values and max(values) > 4 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ticks = sorted({e for b in first["buckets"] for e in (b["from"], b["to"]) if e >= left})
    doubled = [edge for edge in ticks if _is_doubling(edge, first["length"])]
    axes.set_xticks(sorted({*doubled, first["base_context"], first["length"]}))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _tokens(value)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.annotate(
        " original context",
        (first["base_context"], 0.985),
        xycoords=("data", "axes fraction"),
        va="top",
        fontsize=9,
        color="#7a6a42",
    )
    axes.set_xlabel("tokens seen before the predicted one")
    axes.set_ylabel("perplexity")
    axes.set_title(
        title or f"Perplexity by position, windows of {first['length']} tokens",
        loc="left",
        fontsize=11,
        fontweight="bold",
    )
    axes.grid(axis="y", color="#e2e8f0", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False, loc="best")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=PLOT_DPI)
    pyplot.close(figure)


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


def _middle(bucket: dict[str, Any]) -> float:
    return (
        float(max(1, bucket["from"]) * bucket["to"]) ** 0.5
        if bucket["from"]
        else (bucket["to"] / 2)
    )


def _is_doubling(edge: int, length: int) -> bool:
    return edge > 0 and (length / edge).is_integer() and (length // edge).bit_count() == 1


def _tokens(value: float) -> str:
    return f"{value / 1024:g}k" if value >= 4096 and value % 1024 == 0 else f"{value:g}"

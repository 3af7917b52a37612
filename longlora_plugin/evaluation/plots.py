"""Pictures of results: perplexity by position, passkey by length and depth, scores by length."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from longlora_plugin.evaluation.results import Row
from longlora_plugin.evaluation.tables import (
    depth_label,
    labels_of,
    lengths_of,
    mean_score,
    tokens_label,
)

COLORS = ("#4a5568", "#dd8452", "#2b6cb0", "#2f855a", "#805ad5", "#b83280")
"""Line colours in the order of models: base, base+rope, what was trained, others."""

PLOT_DPI = 160


def _figure(width: float, height: float) -> Any:
    """A figure that needs no screen."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Any, path: str | Path) -> None:
    path = Path(path).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=PLOT_DPI)


def _token_axis(axes: Any, ticks: Sequence[int], label: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, map(tokens_label, ticks))
    axes.set_xticks([], minor=True)
    axes.set_xlabel(label)


def _finish_lines(axes: Any, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.grid(axis="y", color="#e2e8f0", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="best")


def _line(axes: Any, label: str, index: int, points: Sequence[tuple[float, float]]) -> None:
    x, y = [at for at, _ in points], [value for _, value in points]
    axes.plot(x, y, "o-", color=COLORS[index % len(COLORS)], linewidth=2, markersize=4, label=label)


def plot_positions(rows: Sequence[Row], path: str | Path) -> None:
    """Draw perplexity by position at the longest length, one line a model, as a PNG.

    Buckets are drawn at their geometric middle; the base model's context is marked.
    """
    figure = _figure(8, 4.6)
    axes = figure.subplots()
    longest = [row for row in rows if row["length"] == lengths_of(rows)[-1]]
    first = longest[0]
    axes.axvspan(first["base_context"], first["length"], color="#f7f3e8", zorder=0)
    axes.axvline(first["base_context"], color="#a08c5b", linewidth=1.2, linestyle=(0, (4, 3)))
    values = []
    for index, row in enumerate(longest):
        points = [(_middle(b), b["perplexity"]) for b in row["buckets"] if b["perplexity"]]
        values += [perplexity for _, perplexity in points]
        _line(axes, row["model"], index, points)
    left = min(_middle(bucket) for bucket in first["buckets"]) / 1.15
    # Where a model falls apart beyond its context, a linear scale would flatten all the others.
    if values and max(values) > 4 * min(values):
        axes.set_yscale("log")
        axes.set_yticks(log_ticks(min(values), max(values)))
        axes.set_yticks([], minor=True)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ticks = sorted({e for b in first["buckets"] for e in (b["from"], b["to"]) if e >= left})
    doubled = [edge for edge in ticks if _is_doubling(edge, first["length"])]
    ends = {first["base_context"], first["length"]}
    _token_axis(axes, sorted({*doubled, *ends}), "tokens seen before the predicted one")
    axes.set_xlim(left, first["length"] * 1.02)
    axes.annotate(
        " base model's context",
        (first["base_context"], 0.985),
        xycoords=("data", "axes fraction"),
        va="top",
        fontsize=9,
        color="#7a6a42",
    )
    axes.set_ylabel("perplexity")
    _finish_lines(axes, f"Perplexity by position, windows of {first['length']} tokens")
    _save(figure, path)


def plot_scores(rows: Sequence[Row], path: str | Path) -> None:
    """Draw the mean score by length, one line a model, as a PNG."""
    figure = _figure(7, 4.2)
    axes = figure.subplots()
    for index, label in enumerate(labels_of(rows)):
        group = [row for row in rows if row["model"] == label]
        points = [(length, 100 * mean_score(group, length)) for length in lengths_of(group)]
        _line(axes, label, index, points)
    _token_axis(axes, lengths_of(rows), "tokens")
    axes.set_ylim(-3, 103)
    axes.set_ylabel("mean score, %")
    _finish_lines(axes, f"{len({row['task'] for row in rows})} tasks by context length")
    _save(figure, path)


def plot_heat_map(
    rows: Sequence[Row],
    path: str | Path,
    *,
    base_context: int | None = None,
    target_context: int | None = None,
) -> None:
    """Draw depth × length heat maps, one for each model, as a PNG.

    Lines mark where a column lies beyond the base model's context and beyond the trained one.
    """
    labels, lengths = labels_of(rows), lengths_of(rows)
    depths = list(dict.fromkeys(row["depth"] for row in rows))
    found = {(row["model"], row["length"], row["depth"]): row["accuracy"] for row in rows}
    marks = []
    for context, style, what in (
        (base_context, "dashed", "the base model's context"),
        (target_context, "solid", "the trained one"),
    ):
        within = sum(length <= context for length in lengths) if context else 0
        if context and 0 < within < len(lengths):
            marks.append((within, style, f"{style}: {what}, {tokens_label(context)}"))
    width = 1.6 + len(labels) * (1.0 + 0.62 * len(lengths))
    figure = _figure(width, 1.3 + 0.42 * len(depths))
    axes = figure.subplots(1, len(labels), squeeze=False, sharey=True)
    for place, label in zip(axes.flat, labels, strict=True):
        grid = [[found.get((label, n, depth), math.nan) for n in lengths] for depth in depths]
        cells = place.pcolormesh(grid, cmap="YlGnBu", vmin=0, vmax=1, edgecolors="white")
        for row, column in product(range(len(depths)), range(len(lengths))):
            share = grid[row][column]
            if not math.isnan(share):
                ink, at = "white" if share > 0.55 else "black", (column + 0.5, row + 0.5)
                place.annotate(f"{share:.0%}", at, ha="center", va="center", size=8, color=ink)
        for within, style, _ in marks:
            place.axvline(within, color="#c05621", linewidth=1.6, linestyle=style)
        place.set_xticks([i + 0.5 for i in range(len(lengths))], map(tokens_label, lengths))
        place.set_yticks([i + 0.5 for i in range(len(depths))], map(depth_label, depths))
        place.tick_params(length=0)
        place.spines[:].set_visible(False)
        place.set_title(label, loc="left", fontsize=10)
        place.set_xlabel("tokens")
    axes[0, 0].invert_yaxis()
    axes[0, 0].set_ylabel("depth")
    figure.colorbar(cells, ax=axes, shrink=0.8, label="accuracy", format=lambda v, _: f"{v:.0%}")
    figure.suptitle("Passkey retrieval", x=0.01, ha="left", fontsize=12, fontweight="bold")
    told = "; ".join(mark for _, _, mark in marks)
    figure.supxlabel(told, fontsize=8, color="#c05621", x=0.01, ha="left")
    _save(figure, path)


def _middle(bucket: dict[str, Any]) -> float:
    low, high = bucket["from"], bucket["to"]
    return math.sqrt(low * high) if low else high / 2


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers around `low` … `high` for a logarithmic axis, as coarse as they are enough."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks: list[float] = []
    for digits in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)):
        ticks = [float(f"{digit}e{decade}") for decade in decades for digit in digits]
        inside = [tick for tick in ticks if low <= tick <= high]
        if len(inside) >= 4:
            return inside
    return [tick for tick in ticks if low / 1.5 <= tick <= high * 1.5]


def _is_doubling(edge: int, length: int) -> bool:
    return edge > 0 and (length / edge).is_integer() and (length // edge).bit_count() == 1

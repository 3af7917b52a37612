"""Tables and heat maps of passkey retrieval."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from longlora_plugin.evaluation.needle_grid import groups_of
from longlora_plugin.evaluation.results import Row
from longlora_plugin.evaluation.tables import PLOT_DPI, TABLE, lengths_of

LIGHTEST = (247, 240, 228)
DARKEST = (33, 102, 112)


def depth_tables(rows: Sequence[Row]) -> list[Table]:
    """A table of depths × lengths for each model and number of needles."""
    tables = []
    for label, needles, group in groups_of(rows):
        first = group[0]
        how = "greedy decoding, exact match" if first["by"] == "generate" else "likelihood"
        table = Table(
            title=f"Passkey accuracy: {label}" + (f", {needles} needles" if needles > 1 else ""),
            caption=f"{first['trials']} trials a cell; {how}; guessing {first['chance']:.2g}; "
            f"seed {first['seed']}",
            **TABLE,
        )
        table.add_column("depth", justify="right")
        for length in lengths_of(group):
            table.add_column(str(length), justify="right")
        for depth in dict.fromkeys(row["depth"] for row in group):
            cells = [_cell(group, length, depth) for length in lengths_of(group)]
            table.add_row(_depth(depth), *cells)
        if len({row["depth"] for row in group}) > 1:
            table.add_section()
            table.add_row("mean", *(f"{_mean(group, n):.0%}" for n in lengths_of(group)))
        tables.append(table)
    return tables


def plot_heat_map(
    rows: Sequence[Row],
    path: str | Path,
    *,
    base_context: int | None = None,
    target_context: int | None = None,
) -> None:
    """Draw depth × length heat maps, one for each model and number of needles, as a PNG.

    Lines mark where a column lies beyond the base model's context and beyond the trained one.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.colors import LinearSegmentedColormap

    groups = list(groups_of(rows))
    lengths = lengths_of(rows)
    depths = list(dict.fromkeys(row["depth"] for row in rows))
    shades = [tuple(channel / 255 for channel in shade) for shade in (LIGHTEST, DARKEST)]
    colors = LinearSegmentedColormap.from_list("accuracy", shades)
    width = len({label for label, _, _ in groups})
    height = len(groups) // width
    figure, axes = pyplot.subplots(
        height,
        width,
        figsize=(1.6 + width * (1.0 + 0.62 * len(lengths)), height * (1.3 + 0.42 * len(depths))),
        layout="constrained",
        squeeze=False,
        sharey=True,
    )
    image = None
    # A column for each model, a row for each number of needles; rows come model by model.
    for place, (label, needles, group) in zip(axes.T.flat, groups, strict=True):
        grid = [[_accuracy(group, length, depth) for length in lengths] for depth in depths]
        image = place.imshow(grid, cmap=colors, vmin=0, vmax=1, aspect="auto")
        for row, line in enumerate(grid):
            for column, value in enumerate(line):
                if value == value:  # a cell without a row is NaN
                    place.text(
                        column,
                        row,
                        f"{value:.0%}",
                        ha="center",
                        va="center",
                        fontsize=8,
                        color="white" if value > 0.55 else "#3b3b3b",
                    )
        for context, style in ((base_context, (0, (3, 2))), (target_context, "solid")):
            beyond = [i for i, length in enumerate(lengths) if context and length > context]
            if beyond and beyond[0] > 0:
                place.axvline(beyond[0] - 0.5, color="#c05621", linewidth=1.6, linestyle=style)
        place.set_xticks(range(len(lengths)), [_tokens(length) for length in lengths])
        place.set_yticks(range(len(depths)), [_depth(depth) for depth in depths])
        place.set_xticks([i - 0.5 for i in range(1, len(lengths))], minor=True)
        place.set_yticks([i - 0.5 for i in range(1, len(depths))], minor=True)
        place.grid(which="minor", color="white", linewidth=1.5)
        place.tick_params(which="both", length=0)
        for spine in place.spines.values():
            spine.set_visible(False)
        place.set_title(
            label + (f", {needles} needles" if needles > 1 else ""), loc="left", fontsize=10
        )
    for place in axes[:, 0]:
        place.set_ylabel("depth")
    for place in axes[-1]:
        place.set_xlabel("tokens")
    figure.colorbar(image, ax=axes, shrink=0.8, label="accuracy", format=lambda v, _: f"{v:.0%}")
    marks = []
    if base_context and lengths[-1] > base_context > lengths[0] - 1:
        marks.append(f"dashed: the base model's context, {_tokens(base_context)}")
    if target_context and lengths[-1] > target_context > lengths[0] - 1:
        marks.append(f"solid: the trained one, {_tokens(target_context)}")
    figure.suptitle("Passkey retrieval", x=0.01, ha="left", fontsize=12, fontweight="bold")
    if marks:
        figure.supxlabel("; ".join(marks), fontsize=8, color="#c05621", x=0.01, ha="left")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=PLOT_DPI)
    pyplot.close(figure)


def _find(rows: Sequence[Row], length: int, depth: Any) -> Row | None:
    return next((r for r in rows if r["length"] == length and r["depth"] == depth), None)


def _accuracy(rows: Sequence[Row], length: int, depth: Any) -> float:
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


def _depth(depth: Any) -> str:
    return str(depth) if depth == "random" else f"{depth:.0%}"


def _tokens(value: int) -> str:
    return f"{value / 1024:g}k" if value >= 4096 and value % 1024 == 0 else str(value)

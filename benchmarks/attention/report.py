"""Rows of results as ratios, a table, a picture."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """Result of one method on one case; `peak_bytes` is forward + backward over what was there."""

    method: str
    length: int
    group_size: int
    groups: str
    attention: str
    heads: int
    kv_heads: int
    seconds: float
    rounds: int
    peak_bytes: int


def ratios(rows: list[Row]) -> Iterator[tuple[Row, dict[str, float]]]:
    """Each S² row with its time over that of the other methods on the same case."""
    for row in rows:
        if not row.method.startswith("s2"):
            continue
        alike = {
            other.method: row.seconds / other.seconds
            for other in rows
            if not other.method.startswith("s2")
            and (other.length, other.groups, other.attention)
            == (row.length, row.groups, row.attention)
        }
        before = [
            other
            for other in rows
            if other.method == row.method
            and (other.length * 2, other.groups, other.attention)
            == (row.length, row.groups, row.attention)
        ]
        if before:
            alike["half"] = row.seconds / before[0].seconds
        yield row, alike


HEADER = (
    "heads",
    "groups",
    "tokens",
    "method",
    "ms",
    "÷ full",
    "÷ floor",
    "÷ roll",
    "÷ half the tokens",
    "peak MiB",
    "full MiB",
)


def table(rows: list[Row]) -> list[tuple[str, ...]]:
    """One line for each S² row, as text."""
    lines = []
    for row, over in ratios(rows):
        full = next(
            other
            for other in rows
            if other.method == "full"
            and (other.length, other.groups, other.attention)
            == (row.length, row.groups, row.attention)
        )
        lines.append(
            (
                f"{row.attention} {row.heads}/{row.kv_heads}",
                row.groups,
                f"{row.length}",
                row.method,
                f"{row.seconds * 1000:.0f}" if row.seconds > 0.1 else f"{row.seconds * 1000:.2f}",
                *[
                    f"{over[name]:.2f}" if name in over else "–"
                    for name in ("full", "floor", "roll", "half")
                ],
                f"{row.peak_bytes / 2**20:.0f}",
                f"{full.peak_bytes / 2**20:.0f}",
            )
        )
    return lines


def plot(rows: list[Row], title: str, path: Path) -> None:
    """Time over tokens, both axes logarithmic, a panel for each kind of heads and groups."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = sorted({(row.attention, row.groups) for row in rows}, reverse=True)
    columns = min(2, len(panels))  # as many as can be read at the width of a page
    figure, axes = pyplot.subplots(
        -(-len(panels) // columns),
        columns,
        figsize=(4.6 * columns, 3.6 * -(-len(panels) // columns)),
        sharey=True,
        squeeze=False,
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (attention, groups) in zip(axes.flat, panels, strict=False):
        here = [row for row in rows if (row.attention, row.groups) == (attention, groups)]
        for method in dict.fromkeys(row.method for row in here):
            points = sorted((r.length, r.seconds) for r in here if r.method == method)
            axis.plot(*zip(*points, strict=True), marker="o", label=method)
        axis.set(xscale="log", yscale="log", xlabel="tokens", title=f"{attention}, G = {groups}")
        ticks = sorted({row.length for row in here})
        axis.set_xticks(
            ticks, [f"{tick // 1024}k" if tick >= 1024 else f"{tick}" for tick in ticks]
        )
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    for axis in axes[:, 0]:
        axis.set_ylabel("seconds, forward + backward")
    axes[0][0].legend()
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)

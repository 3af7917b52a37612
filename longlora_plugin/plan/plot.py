"""Memory and FLOPs of a recipe against length, full attention and S², on two log-log panels."""

from __future__ import annotations

from pathlib import Path

from longlora_plugin.plan.gpus import Gpu
from longlora_plugin.plan.memory import GIB
from longlora_plugin.plan.planner import Run


def lengths_around(length: int) -> list[int]:
    """Lengths to draw: powers of √2 from an eighth to eight times the recipe's, in even tokens."""
    return sorted({max(8, round(length * 2 ** (step / 2)) // 2 * 2) for step in range(-6, 7)})


def plot_plan(run: Run, length: int, card: Gpu | None, path: str | Path) -> None:
    """Draw the plan of a recipe of `length` tokens a row; `card` adds its memory as a line."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullLocator

    lengths = lengths_around(length)
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    plans = [run.memory_at(n) for n in lengths]
    left.plot(lengths, [p.total / GIB for p in plans], color="#1f77b4", label="total")
    left.plot(
        lengths,
        [p.needed / GIB for p in plans],
        color="#1f77b4",
        linestyle="--",
        label="needed (no fragments)",
    )
    if card:
        left.axhline(card.memory, color="#d62728", linewidth=1.2, label=card.name)
    left.set(title="Memory on each GPU (full attention and S² alike)", ylabel="GiB")
    full = [run.step_at(n, None)["total"] for n in lengths]
    sparse = [run.step_at(n, run.group_at(n))["total"] for n in lengths]
    right.plot(lengths, full, color="#7f7f7f", label="full attention")
    right.plot(lengths, sparse, color="#2ca02c", label="S²")
    right.set(title="A training step, one row", ylabel="TFLOPs (causal)")
    for axes in (left, right):
        axes.set(xscale="log", yscale="log", xlabel="sequence_len (tokens)")
        axes.axvline(length, color="black", linewidth=0.8, linestyle=":", label="this recipe")
        axes.set_xticks(lengths[::2], [_short(n) for n in lengths[::2]])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(FuncFormatter(_some_minor))
        axes.grid(alpha=0.3, which="both")
        axes.legend()
    figure.savefig(path, dpi=130)


def _short(tokens: int) -> str:
    return f"{tokens / 1024:g}k" if tokens % 1024 == 0 else f"{tokens}"


def _some_minor(value: float, _: int | None) -> str:
    # Every minor label of a decade would overlap; 2 and 5 are enough to read a value.
    return f"{value:g}" if f"{value:.0e}"[0] in "25" else ""

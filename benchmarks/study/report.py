"""The study's tables, plots and page from its rows; measures nothing itself."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.study import results as figures
from benchmarks.study import rivals
from benchmarks.study.claims import CLAIMS, difference
from benchmarks.study.plan import QUESTIONS, Question, Row
from benchmarks.study.recall import VALUES
from benchmarks.study.results import Results, Value
from longlora_plugin.evaluation.plots import log_ticks

INTRODUCTION = Path(__file__).with_name("introduction.md")
CONCLUSIONS = Path(__file__).with_name("conclusions.md")
"""Written by people from the runs in docs/explanation/study.json; says so."""


@dataclass(frozen=True)
class Table:
    """A table of text: a header and as many cells in each line."""

    header: tuple[str, ...]
    lines: list[tuple[str, ...]]

    def markdown(self) -> str:
        rule = ["---", *["--:"] * (len(self.header) - 1)]
        rows = [self.header, tuple(rule), *self.lines]
        return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


NEAR = {
    "×32: who comes near full attention?": ("x32", "x32-rivals"),
    "×32: and after three times as many steps?": ("x32-longer",),
}
"""Title → the questions whose rows are compared with the full attention of the first."""
RETRIEVAL_LENGTHS = (256, 512, 1024, 2048)
RECALLED = {"facts recalled": "all", "256–512 back": "256-512", "over 1024 back": "1024-2048"}

Column = tuple[str, Callable[[Results, Row], Value | None], int]
"""Header, figure, digits."""


def _measured(figure: Callable[[figures.Measured], float]) -> Callable[..., Value | None]:
    return lambda results, row: results.value(row, figure)


def columns_of(question: Question) -> list[Column]:
    """What a question's table shows beside the label and the number of seeds."""
    settings = question.rows[-1].settings
    target = settings.target
    if question.name == "steps":
        steps = (*settings.watch, settings.steps)
        return [(f"{step} steps", _measured(figures.at_step(step)), 2) for step in steps]
    columns: list[Column] = [
        ("perplexity", _measured(figures.perplexity), 2),
        ("in rows of 64", _measured(figures.short), 2)
        if settings.task == "recall"
        else ("at 0–256", _measured(figures.at("first")), 2),
        (f"at {target // 2}–{target}", _measured(figures.at("last")), 2),
    ]
    full = next((row for row in question.rows if row.label == "full attention"), None)
    if full is not None and settings.steps:
        columns.append(("last half against full, %", _against(full), 1))
    if settings.task == "retrieval":
        columns += [
            (f"digits found, {length} tokens, %", _measured(figures.retrieved(length)), 0)
            for length in RETRIEVAL_LENGTHS
        ]
        columns.append(("found over 1024 back, %", _measured(figures.retrieved_far), 0))
    if settings.task == "recall":
        columns += [
            (f"{header}, %", _measured(figures.recalled(name)), 0)
            for header, name in RECALLED.items()
        ]
    if question.name in ("attention", "groups"):
        columns.append(("evaluated sparse", _measured(figures.evaluated_sparse), 2))
    if question.name == "adapters":
        columns.append(("adapter, MB", _measured(lambda m: 4 * m["trainable_parameters"] / 1e6), 2))
    elif question.name in ("methods", "rates"):
        columns.append(("trainable, k", _measured(lambda m: m["trainable_parameters"] / 1e3), 0))
    elif settings.steps:
        columns.append(("attention's cost, %", _cost, 0))
    if settings.steps and question.name != "adapters":  # made while other things ran
        columns.append(("s/step", _fastest(figures.seconds_a_step), 2))
        columns.append(("tokens/s", _fastest(figures.tokens_a_second, best=max), 0))
    return columns


def _fastest(
    figure: Callable[[figures.Measured], float], best: Callable[..., float] = min
) -> Callable[[Results, Row], Value | None]:
    """Of the seed that the machine's other work slowed least; untrained rows have none."""

    def of(results: Results, row: Row) -> Value | None:
        value = results.value(row, figure) if row.settings.steps else None
        return Value({0: best(value.of_seed.values())}) if value else None

    return of


def _cost(results: Results, row: Row) -> Value | None:
    return Value({0: 100 * figures.cost(row.settings)}) if row.settings.steps else None


def _against(full: Row) -> Callable[[Results, Row], Value | None]:
    """Perplexity in the last half of the length, in percent above that of row `full`."""

    def figure(results: Results, row: Row) -> Value | None:
        found = difference(results, row, full, figures.at("last"))
        return Value(dict(enumerate(found.of_seed))) if found and row is not full else None

    return figure


def table_of(question: Question, results: Results) -> Table:
    columns = columns_of(question)
    lines = []
    for row in question.rows:
        if not results.of(row):
            continue
        cells = [row.label, str(len(results.of(row)))]
        for _, figure, digits in columns:
            value = figure(results, row)
            cells.append(value.text(digits) if value and not math.isnan(value.mean) else "–")
        lines.append(tuple(cells))
    return Table(("", "seeds", *[name for name, _, _ in columns]), lines)


# --- plots -----------------------------------------------------------------------------------


def plot(question: Question, results: Results, path: Path) -> None:
    """The question's picture, of the rows that were run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [row for row in question.rows if results.of(row)]
    figure, axes = plt.subplots(figsize=(8.5, 4), layout="constrained")
    draw = {"retrieval": _draw_lengths, "recall": _draw_distances}.get(
        rows[0].settings.task, _draw_positions
    )
    if question.name == "steps":
        draw = _draw_steps
    draw(axes, rows, results)
    axes.set_title(question.title)
    figure.legend(loc="outside right upper", fontsize="small", frameon=False)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_positions(axes: Any, rows: Sequence[Row], results: Results) -> None:
    for row in rows:
        buckets = list(next(iter(results.of(row).values()))["by_position"])
        values = [results.value(row, figures.at(bucket)) for bucket in buckets]
        _draw_line(axes, row.label, buckets, values)
    axes.set_xlabel("position, tokens")
    axes.set_ylabel("perplexity on held-out books")


def _draw_lengths(axes: Any, rows: Sequence[Row], results: Results) -> None:
    for row in rows:
        values = [results.value(row, figures.retrieved(length)) for length in RETRIEVAL_LENGTHS]
        _draw_line(axes, row.label, [str(length) for length in RETRIEVAL_LENGTHS], values)
    axes.axhline(10, color="grey", linestyle=":", label="by luck")
    axes.set_xlabel("length of the window, tokens")
    axes.set_ylabel("digits of the passkey found, %")


def _draw_distances(axes: Any, rows: Sequence[Row], results: Results) -> None:
    for row in rows:
        distances = list(next(iter(results.of(row).values()))["recall"]["by_distance"])
        values = [results.value(row, figures.recalled(distance)) for distance in distances]
        _draw_line(axes, row.label, distances, values)
    axes.axhline(100 / VALUES, color="grey", linestyle=":", label="by luck")
    axes.set_xlabel("how far back the fact stands, bytes")
    axes.set_ylabel("facts recalled, %")


def _draw_steps(axes: Any, rows: Sequence[Row], results: Results) -> None:
    every: list[float] = []
    for row in rows:
        watched = next(iter(results.of(row).values()))["watched"]
        values = [seen["perplexity"] for seen in watched.values()]
        axes.plot([int(step) for step in watched], values, "o-", label=row.label)
        every += values
    axes.set_yscale("log")
    ticks = log_ticks(min(every), max(every))
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel("perplexity on held-out books")


def _draw_line(axes: Any, label: str, ticks: list[str], values: list[Value]) -> None:
    style = ("o-", "s--")[len(axes.lines) // 10 % 2]  # matplotlib has ten colors
    line = axes.plot(ticks, [value.mean for value in values], style, label=label, markersize=4)
    low, high = [value.low for value in values], [value.high for value in values]
    axes.fill_between(ticks, low, high, alpha=0.2, color=line[0].get_color(), linewidth=0)


# --- the page --------------------------------------------------------------------------------


def write_page(results: Results, folder: Path) -> Path:
    """`study.md`, a PNG for each question, and every figure in `study.json`, in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    introduction = INTRODUCTION.read_text(encoding="utf-8").strip()
    parts = [introduction, "## Claim by claim", _claims_table(results).markdown()]
    parts.append(CONCLUSIONS.read_text(encoding="utf-8").strip())
    for question in QUESTIONS:
        table = table_of(question, results)
        if not table.lines:
            continue
        image = f"study-{question.name}.png"
        plot(question, results, folder / image)
        parts += [f"## {question.title}", table.markdown(), f"![{question.title}]({image})"]
    where = next((i for i, part in enumerate(parts) if part.startswith("## ×32")), len(parts))
    for title, questions in NEAR.items():
        near = rivals.lines(results, questions)
        if near:
            parts[where:where] = [f"## {title}", Table(rivals.HEADER, near).markdown()]
            where += 2
    if results.timing:
        parts += ["## Time", _time_text(results.timing)]
    if results.missing():
        parts.append(f"{results.missing()} runs of the plan are not there yet: `make study`.")
    everything = {"rows": results.rows, "timing": results.timing}
    (folder / "study.json").write_text(json.dumps(everything, indent=1) + "\n")
    parts.append("Every figure of every run: [study.json](study.json).")
    page = folder / "study.md"
    page.write_text("\n\n".join(parts) + "\n")
    return page


def _time_text(timing: dict[str, Any]) -> str:
    seconds, speed = timing["seconds_a_step"], timing["tokens_a_second"]
    return (
        f"A training step of 4096 tokens at 2048, one thread, alternately in one process, medians "
        f"of {timing['rounds']}: {seconds['s2']:.2f} s with S² ({speed['s2']:.0f} tokens/s) and "
        f"{seconds['full']:.2f} s with full attention ({speed['full']:.0f} tokens/s), ratio "
        f"{timing['s2_over_full']:.2f}. The paper has 0.67 for a whole run of 7B at 32k and 0.57 "
        f"at 64k (Table 12)."
    )


def _claims_table(results: Results) -> Table:
    verdicts = [claim.judge(results) for claim in CLAIMS]
    lines = [(v.claim, v.paper, v.here, v.verdict) for v in verdicts]
    return Table(("claim", "paper", "here", "verdict"), lines)


def show(results: Results) -> None:
    """The tables on the terminal."""
    from rich.console import Console
    from rich.table import Table as RichTable

    console = Console()
    tables = [(q.title, table_of(q, results)) for q in QUESTIONS]
    for title, table in [*tables, ("Claim by claim", _claims_table(results))]:
        if table.lines:
            rich = RichTable(*table.header, title=title)
            for cells in table.lines:
                rich.add_row(*cells)
            console.print(rich)

"""×32: which way of training comes near full attention at half of its attention's cost or less?

Near: within `PERPLEXITY` percent in the last half of the length and `RECALL` points of the facts
recalled, with every seed or in their mean. The page's table is computed here from the rows.
"""

from __future__ import annotations

from benchmarks.study import results as figures
from benchmarks.study.claims import Difference, difference
from benchmarks.study.plan import Row
from benchmarks.study.results import Results

PERPLEXITY, RECALL, COST = 1.0, 3.0, 50.0

HEADER = (
    "against full attention, seed by seed",
    "attention's cost, %",
    "perplexity, last half",
    "facts recalled",
    "perplexity, rows of 64 bytes",
    "near, at half the cost?",
)


def lines(results: Results, questions: tuple[str, ...]) -> list[tuple[str, ...]]:
    """A line for each row of `questions` that was run, the nearest in recall first."""
    full = results.row(questions[0], "full attention")
    found = []
    for row in (row for name in questions for row in results.question(name).rows):
        line = _line(results, row, full)
        if line is not None:
            found.append(line)
    return [cells for _, cells in sorted(found, key=lambda line: -line[0])]


def _line(results: Results, row: Row, full: Row) -> tuple[float, tuple[str, ...]] | None:
    perplexity = difference(results, row, full, figures.at("last"))
    recall = difference(results, row, full, figures.recalled("all"), unit="points")
    short = difference(results, row, full, figures.short)
    if row is full or not (perplexity and recall and short):
        return None
    cost = 100 * figures.cost(row.settings) if row.settings.steps else 0.0
    texts = (f"{cost:.0f}", perplexity.text(), recall.text(), short.text())
    return recall.mean, (row.label, *texts, verdict(perplexity, recall, cost))


def verdict(perplexity: Difference, recall: Difference, cost: float) -> str:
    """`yes` where every seed is near and the cost is small enough, else what fails.

    `in the mean` where only the mean of the seeds is near; then what fails is of single seeds.
    """
    seeds, mean = (
        [
            *(["perplexity"] if worse > PERPLEXITY else []),
            *(["recall"] if less < -RECALL else []),
            *(["cost"] if cost > COST else []),
        ]
        for worse, less in (
            (max(perplexity.of_seed), min(recall.of_seed)),
            (perplexity.mean, recall.mean),
        )
    )
    if not seeds:
        said = "yes"
    elif mean:
        said = f"no: {', '.join(seeds)}"
    else:
        said = f"in the mean; not every seed: {', '.join(seeds)}"
    return said if len(recall.of_seed) > 1 else f"{said} (one seed)"

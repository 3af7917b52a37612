"""What training on LongQA gained.

    python -m benchmarks.experiments.longqa.table BASE.json SEED.json… --out DIR

Reads what `score.py` wrote: of the model before training, and of one model for each seed. Prints a
table by task, and writes it as `table.md` and, with every figure of every seed, as `table.json`.

The spread over the seeds says how much depends on the training run. How much depends on which
questions were drawn, the last column says: the gain in what the document is worth, mean of the
seeds, with the interval that holds it in 95 % of DRAWS redraws of the questions (bootstrap).
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

COLUMNS = {
    "exact": ("exact match", "%"),
    "begins": ("begins right", "%"),
    "first": ("ranked first", "%"),
    "nll": ("nats a token", ""),
    "nll_other": ("other document", ""),
    "worth": ("worth of the document", ""),
}
"""Measure → (its name in the table, `%` where it is a share)."""

DRAWS = 2000

Table = Mapping[str, Mapping[str, float]]


def with_worth(by_task: Table) -> dict[str, dict[str, float]]:
    """The same with `worth`: nats a token that the right document saves over another one."""
    return {
        task: {**measures, "worth": measures["nll_other"] - measures["nll"]}
        for task, measures in by_task.items()
    }


def compare(before: Table, after: Sequence[Table]) -> dict[str, dict[str, dict[str, Any]]]:
    """Task → measure → before, mean, min, max over seeds, and the values of every seed.

    Raises:
        ValueError: the models were not asked the same numbers of questions.
    """
    counts = [{task: each[task]["questions"] for task in each} for each in (before, *after)]
    if any(count != counts[0] for count in counts):
        raise ValueError(f"not the same questions: {counts}; score all models on the same rows")
    first, others = with_worth(before), [with_worth(each) for each in after]
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for task, measures in first.items():
        rows[task] = {}
        for name in COLUMNS:
            values = [each[task][name] for each in others]
            rows[task][name] = {
                "before": measures[name],
                "mean": statistics.fmean(values),
                "min": min(values),
                "max": max(values),
                "seeds": values,
            }
    return rows


def worth_gains(
    before: Sequence[Mapping[str, Any]], after: Sequence[Sequence[Mapping[str, Any]]]
) -> dict[str, tuple[float, float, float]]:
    """Task → gain of `worth`, nats a token, mean of the seeds, and its 95 % interval.

    Args:
        before: results of the model before training, one for each question.
        after: of each seed, the same questions in the same order.

    Raises:
        ValueError: the questions differ.
    """
    gains: dict[str, list[tuple[float, int]]] = defaultdict(list)
    for first, *others in zip(before, *after, strict=True):
        if any(each["row"] != first["row"] for each in others):
            raise ValueError("not the same questions; score all models on the same rows")
        worth = [each["nll_other"] - each["nll"] for each in (first, *others)]
        gain = statistics.fmean(worth[1:]) - worth[0]
        gains[first["task"]].append((gain, first["answer_tokens"]))
    found = {}
    for task, pairs in sorted(gains.items()):
        draw = random.Random(task)
        redrawn = sorted(_a_token(draw.choices(pairs, k=len(pairs))) for _ in range(DRAWS))
        edge = DRAWS * 25 // 1000
        found[task] = (_a_token(pairs), redrawn[edge], redrawn[-1 - edge])
    return found


def _a_token(pairs: Sequence[tuple[float, int]]) -> float:
    return sum(gain for gain, _ in pairs) / sum(tokens for _, tokens in pairs)


def cell(figures: Mapping[str, Any], share: bool) -> str:
    """`before → mean (min–max)`, shares in per cent."""
    scale, digits = (100, 0) if share else (1, 2)
    before, mean, low, high = (
        f"{scale * figures[key]:.{digits}f}" for key in ("before", "mean", "min", "max")
    )
    return f"{before} → {mean} ({low} to {high})"


def markdown(
    rows: Mapping[str, Mapping[str, Mapping[str, Any]]],
    names: Sequence[str],
    gains: Mapping[str, tuple[float, float, float]] | None = None,
) -> str:
    """A Markdown table of these measures."""
    titles = [f"{COLUMNS[name][0]}{' [%]' if COLUMNS[name][1] == '%' else ''}" for name in names]
    if gains is not None:
        titles.append("gain of worth [95 % over questions]")
    lines = [f"| task | {' | '.join(titles)} |", "|---" * (len(titles) + 1) + "|"]
    for task, measures in rows.items():
        extra = "" if gains is None else f" {_gain(gains.get(task))} |"
        cells = [cell(measures[name], COLUMNS[name][1] == "%") for name in names]
        label = f"`{task}`" if task != "all" else "all"
        lines.append(f"| {label} | {' | '.join(cells)} |{extra}")
    return "\n".join(lines) + "\n"


def _gain(gain: tuple[float, float, float] | None) -> str:
    return "" if gain is None else f"{gain[0]:+.2f} [{gain[1]:+.2f}, {gain[2]:+.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True, help="folder for table.md, table.json")
    args = parser.parse_args()
    before, *after = (json.loads(path.read_text()) for path in (args.before, *args.after))
    rows = compare(before["by_task"], [each["by_task"] for each in after])
    gains = worth_gains(before["results"], [each["results"] for each in after])

    from rich.console import Console
    from rich.markdown import Markdown

    text = (
        f"Before training → mean of {len(after)} seeds (lowest to highest).\n\n"
        + markdown(rows, ["nll", "nll_other", "worth"], gains)
        + "\n"
        + markdown(rows, ["exact", "begins", "first"])
    )
    Console().print(Markdown(text))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "table.md").write_text(text, encoding="utf-8")
    names = [each["model"] for each in after]
    (args.out / "table.json").write_text(
        json.dumps({"seeds": names, "tasks": rows, "worth_gains": gains}, indent=1) + "\n",
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()

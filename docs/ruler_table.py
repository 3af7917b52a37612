"""The page of RULER's scores, from the rows that `make ruler` measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from longlora_plugin.evaluation.tables import effective_length, mean_score

RESULTS = Path(__file__).with_name("reference") / "ruler.json"
THRESHOLD = 0.856
HEAD = """# RULER: two tables, read

<!-- Written by docs/generate.py from docs/reference/ruler.json; do not edit. -->

What [`longlora bench`](../howto/benchmarks.md) prints, and how to read it. Scores in percent ±
standard error; –: not even the shortest text of the task fits the length. Measured by `make ruler`
on a CPU.

"""
KNOWN = """## Models whose score is known

Made by hand: each finds every needle among the tokens that it sees, and nothing else. Needles lie
at random places, so a model that sees a part of the text finds about that part of them: that is
what a context which was not extended looks like. Its effective length is the last at which it sees
everything.

"""
QUICKSTART = """## The quickstart's models

3.5 million parameters, trained on books only, never on a question. Zeros are what such a model
should score, at any length and with any RoPE; they do not say that extending failed. What it can
show is perplexity by position ([Evaluate](../howto/evaluate.md)).

"""
NO_ADAPTER = """
The adapter is not in the table: `make ruler` ran before `make demo` had trained it.
"""


def page() -> str:
    """The page, from what was measured."""
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    return (
        HEAD
        + KNOWN
        + _table(results["known"])
        + "\n"
        + QUICKSTART
        + _table(results["quickstart"])
        + ("" if any(row["model"] == "adapter" for row in results["quickstart"]) else NO_ADAPTER)
        + "\n"
        + _cost(results)
    )


def _table(rows: list[dict[str, Any]]) -> str:
    lengths = sorted({row["length"] for row in rows})
    lines = ["| model | task |" + "".join(f" {length} |" for length in lengths) + " effective |"]
    lines.append("|---|---|" + "--:|" * (len(lengths) + 1))
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        for task in sorted({row["task"] for row in own}):
            at = {row["length"]: _percent(row) for row in own if row["task"] == task}
            lines.append(f"| {model} | {task} |{_cells(at, lengths)} |")
        means = {
            length: f"{100 * mean_score(own, length):.0f}"
            for length in lengths
            if any(row["length"] == length for row in own)
        }
        effective = effective_length(own, THRESHOLD) or "none"
        lines.append(f"| **{model}** | **mean** |{_cells(means, lengths)} {effective} |")
    return "\n".join(lines) + "\n"


def _cells(at: dict[int, str], lengths: list[int]) -> str:
    return "".join(f" {at.get(length, '–')} |" for length in lengths)


def _percent(row: dict[str, Any]) -> str:
    error = "" if row["stderr"] is None else f" ± {100 * row['stderr']:.0f}"
    return f"{100 * row['score']:.0f}{error}"


def _cost(results: dict[str, Any]) -> str:
    rows = [row for section in results.values() for row in section]
    examples = sorted({row["examples"] for row in rows})
    return (
        f"Examples a cell: {', '.join(map(str, examples))}; lm-eval {rows[0]['lm_eval']}. "
        "RULER itself takes 500. The mean leaves out tasks that do not fit a length, so the "
        "effective length is the longest at which all tasks have a row and the mean is at least "
        f"{THRESHOLD:.1%}.\n"
    )

"""What `--json` of each command writes, from the classes that it is made of."""

from __future__ import annotations

import importlib
import inspect
import re
from dataclasses import fields
from typing import Any, get_type_hints, is_typeddict

ROWS = {
    "bench": "evaluation.rows.BenchRow",
    "eval": "evaluation.rows.PerplexityRow",
    "passkey": "evaluation.rows.PasskeyRow",
    "recipes check": "recipes.CheckedRow",
    "recipes list": "recipes.ListedRow",
    "serve-check": "artifacts.engines.EngineRow",
}
"""Command → the class of each of its rows; the file holds a list."""
OBJECTS = {
    "doctor": "doctor.Diagnosis",
    "longqa build": "longqa.settings.Report",
    "longqa stats": "longqa.stats.OfFiles",
    "plan": "plan.planner.Plan",
}
"""Command → the class of the one object that it writes."""
INSIDE = {
    "doctor": ("doctor.trials.Trial", "run.summary.Fact"),
    "plan": ("plan.planner.OnGpu", "plan.cost.Cost", "plan.remedies.Tried"),
}
"""Command → classes of objects in that one."""


def keys_of(path: str) -> dict[str, tuple[str, str]]:
    """Key of a class → (type, meaning).

    Raises:
        KeyError: a key is not described in a dataclass's docstring.
    """
    module, _, name = path.rpartition(".")
    kind = getattr(importlib.import_module(f"longlora_plugin.{module}"), name)
    if is_typeddict(kind):
        hints = get_type_hints(kind, include_extras=True)
        return {key: (_shown(hint.__origin__), hint.__metadata__[0]) for key, hint in hints.items()}
    meanings: dict[str, str] = {}
    for part in kind.__mro__[-2::-1]:
        meanings |= _attributes(inspect.getdoc(part) or "")
    return {field.name: (str(field.type), meanings[field.name]) for field in fields(kind)}


def _shown(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")


def _attributes(doc: str) -> dict[str, str]:
    _, _, section = doc.partition("Attributes:\n")
    found = re.findall(r"^ {4}(\w[\w, ]*): (.*(?:\n {5,}.*)*)", section, re.MULTILINE)
    return {name: " ".join(text.split()) for names, text in found for name in names.split(", ")}


def table(command: str) -> str:
    """The keys of a command's JSON as tables; nothing for a command without `--json`."""
    path = (ROWS | OBJECTS).get(command)
    if path is None:
        return ""
    what = "`--json` writes a list of rows:" if command in ROWS else "`--json` writes one object:"
    parts = [f"{what}\n\n{_table(path)}"]
    parts += [f"`{each.rpartition('.')[2]}`:\n\n{_table(each)}" for each in INSIDE.get(command, ())]
    return "\n".join(parts)


def _table(path: str) -> str:
    lines = ["| key | type | meaning |", "|---|---|---|"]
    for name, (kind, meaning) in keys_of(path).items():
        cells = (f"`{name}`", f"`{kind}`".replace(" | ", " or "), meaning.replace("|", "\\|"))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"

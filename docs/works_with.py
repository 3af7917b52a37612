"""The page "Works with", from `works_with.yml` and the keys that the package refuses."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

TABLE = Path(__file__).with_name("works_with.yml")
PAGE = """# Works with

<!-- Written by docs/generate.py from the code; do not edit. -->

Every key of Axolotl 0.19 to 0.21, and what it does together with LongLoRA. A test fails where
Axolotl has a key that is not here.

## Refused

`recipes check` and the run refuse these by name, before anything is loaded.

| key | with | because | instead |
|---|---|---|---|
{refused}

Attention without a kernel for S²-Attn is refused, too: {values}.

## Works

Each row is a run through Axolotl's trainer: every trained tensor moves, and what is saved, loaded
again, answers as the trained model did. All runs have {base}.

| run | keys |
|---|---|
{runs}

These have tests of their own:

| test | keys |
|---|---|
{tests}

Preference training and restarts of LoRA: {preference}.

## Taken, but not run here

{not_run}

## No bearing

These have nothing to do with what LongLoRA changes.

{no_bearing}

Keys of the past, which Axolotl refuses or renames: {old}.
"""


def page() -> str:
    """The table that `tests/run/test_works_with.py` runs, for readers."""
    table = yaml.safe_load(TABLE.read_text(encoding="utf-8"))
    tests: dict[str, list[str]] = {}
    for key, test in table["tests"].items():
        tests.setdefault(test, []).append(key)
    runs = {
        name: [key for key in keys if not key.startswith("_")]
        for name, keys in table["runs"].items()
    }
    return PAGE.format(
        refused="\n".join(_refused()),
        values=_codes(table["refused values"]),
        base=_codes(table["base"]),
        runs="\n".join(f"| {name} | {_codes(keys)} |" for name, keys in runs.items()),
        tests="\n".join(f"| `{test}` | {_codes(keys)} |" for test, keys in sorted(tests.items())),
        preference=_codes(table["preference training"]),
        not_run=_paragraphs(table["not run here"]),
        no_bearing=_paragraphs(table["no bearing"]),
        old=_codes(table["old keys"]),
    )


def _refused() -> Iterator[str]:
    from longlora_plugin.run.refusals import REFUSALS

    for row in REFUSALS:
        value = "" if row.example is True else f": {row.example}"
        yield f"| `{row.key}{value}` | {row.scope} | {row.why} | {row.instead} |"


def _paragraphs(topics: Mapping[str, Any]) -> str:
    return "\n\n".join(f"**{topic}**: {_codes(keys)}." for topic, keys in topics.items())


def _codes(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)

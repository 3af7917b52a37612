"""Rows of results: each is in `rows.jsonl` the moment it is there, so nothing is lost."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.cases import find, same


class Rows:
    """The rows of one folder and one machine, and the seconds that are left for more.

    A case with a result is not measured again; one without (an error, no time left) is.
    """

    def __init__(self, folder: Path, budget: float, machine: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "rows.jsonl"
        self.end = time.monotonic() + budget
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        self.machine = machine
        self.rows: list[dict[str, Any]] = [
            row for row in map(json.loads, lines) if row["machine"] == machine
        ]

    def measure(self, key: dict[str, Any], measured: Callable[[], dict[str, Any]]) -> None:
        """Run one measurement and write its row, whatever comes out."""
        if self.find(key).get("result"):
            return
        row: dict[str, Any] = {**key, "machine": self.machine}
        start = time.monotonic()
        if start > self.end:
            row["not_run"] = "no time left"
        else:
            try:
                row["result"] = measured()
            except NotHere as reason:
                row["not_run"] = str(reason)
            except torch.OutOfMemoryError:
                row["not_run"] = "out of memory"
            except Exception as error:
                row["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
                traceback.print_exc()
            row["took_s"] = round(time.monotonic() - start, 2)
        self.rows = [other for other in self.rows if not same(other, key)] + [row]
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)

    def find(self, key: dict[str, Any]) -> dict[str, Any]:
        """The last row of a case; empty where there is none."""
        return find(self.rows, key)

    def wrong(self) -> list[dict[str, Any]]:
        """Rows that are errors or differ from the definition."""
        return [
            row
            for row in self.rows
            if "error" in row or row.get("result", {}).get("right") is False
        ]


class NotHere(Exception):
    """This machine cannot run a case; the message says why."""

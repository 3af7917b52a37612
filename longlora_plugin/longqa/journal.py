"""What makes a build resumable at any point: the rows, and the record of their making.

`OUT.provenance.sqlite` is the record, one table: a line each for the settings, for every unit (one
window of one document) with its pairs, for tokens spent on a reply that gave nothing, and for every
short instruction mixed in. A unit is recorded before its rows are written,
so rows that a kill left unwritten are written again from the record, and no reply of a model is
asked or paid for twice. A row's name is the SHA-256 of its line.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sqlite3
from collections import defaultdict
from pathlib import Path
from typing import Any

from longlora_plugin.longqa.settings import EXIT_DISK
from longlora_plugin.longqa.stopping import Stop

_TABLE = (
    "CREATE TABLE IF NOT EXISTS steps (kind TEXT, name TEXT, content TEXT NOT NULL, "
    "PRIMARY KEY (kind, name))"
)


class CannotWrite(Stop):
    """The disk is full or a file cannot be written; what was finished before is kept."""

    def __init__(self, path: Path, why: object) -> None:
        super().__init__(
            f"{path} cannot be written: {why}; what was finished before is kept, so free some "
            "space and give the same command again",
            EXIT_DISK,
        )


def line_of(row: dict[str, Any]) -> bytes:
    """One row as a line of JSON in UTF-8, with its newline; the same row gives the same bytes."""
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


def row_name(line: bytes) -> str:
    """The name of a row: SHA-256 of its line without the newline, in hex."""
    return hashlib.sha256(line.rstrip(b"\n")).hexdigest()


def validation_path(out: Path) -> Path:
    """Where rows of validation documents go: `data.jsonl` → `data.validation.jsonl`."""
    return out.with_name(f"{out.stem}.validation{out.suffix}")


def provenance_path(out: Path) -> Path:
    """The record of a data file; the validation file shares its training file's."""
    return out.with_name(f"{out.stem.removesuffix('.validation')}.provenance.sqlite")


class Journal:
    """The record of one data file.

    Args:
        out: the data file.
        write: whether steps will be recorded; otherwise no file is made.

    Attributes:
        steps: kind of step → its name → what was recorded of it.
        spent: (prompt, completion) tokens of all runs.

    Raises:
        ValueError: the record is damaged.
        CannotWrite: it cannot be made.
    """

    def __init__(self, out: Path, *, write: bool = False) -> None:
        self.path = provenance_path(out)
        self.steps: defaultdict[str, dict[str, Any]] = defaultdict(dict)
        self.spent = (0, 0)
        place = self.path if write or self.path.exists() else ":memory:"
        try:
            self._database = sqlite3.connect(place, isolation_level=None)
            if write:
                self._database.execute(_TABLE)
            if write or self.path.exists():
                steps = "SELECT kind, name, content FROM steps ORDER BY rowid"
                for kind, name, content in self._database.execute(steps):
                    self._take(kind, name, json.loads(content))
        except sqlite3.OperationalError as error:
            raise CannotWrite(self.path, error) from None
        except (sqlite3.DatabaseError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self.path} is damaged ({error}); restore the file, or remove it and {out.name} "
                "to build anew"
            ) from None

    def _take(self, kind: str, name: str, content: Any) -> None:
        self.steps[kind][name] = content
        spent = content if kind == "spent" else kind == "unit" and content.get("spent")
        if spent:
            self.spent = (self.spent[0] + spent[0], self.spent[1] + spent[1])

    def write(self, kind: str, name: str, content: Any) -> None:
        """Record one finished step, whole or not at all."""
        written = line_of(content).decode()
        try:
            self._database.execute("INSERT INTO steps VALUES (?, ?, ?)", (kind, name, written))
        except sqlite3.OperationalError as error:
            raise CannotWrite(self.path, error) from None
        self._take(kind, name, content)

    def write_spent(self, unit: str, spent: tuple[int, int]) -> None:
        """Record tokens that a reply without use took."""
        self.write("spent", f"{unit} {len(self.steps['spent'])}", list(spent))

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._database.close()


class Rows:
    """The data file of one split; a half-written last line is cut off when it opens.

    Attributes:
        names: names of the rows in the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.names: set[str] = set()
        self._size = 0
        if path.exists():
            with path.open("rb") as stream:
                for line in stream:
                    if line.endswith(b"\n"):
                        self.names.add(row_name(line))
                        self._size += len(line)
            os.truncate(path, self._size)

    def append(self, line: bytes) -> None:
        """Append one row whose name is not in `names` yet, whole or not at all.

        Raises:
            CannotWrite: for example because the disk is full.
        """
        try:
            with self.path.open("ab") as stream:
                stream.write(line)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.truncate(self.path, self._size)
            raise CannotWrite(self.path, error.strerror) from None
        self._size += len(line)
        self.names.add(row_name(line))

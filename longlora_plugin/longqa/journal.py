"""Files that only grow, and survive a kill at any point: the rows, and the record of their making.

`OUT.provenance.jsonl` is the record. Its first line holds the settings; each further line is one
finished step: a document, a unit (one window of one document) with its pairs, tokens spent on a
reply that gave nothing, a short instruction mixed in. A unit is recorded before its rows are
written, so rows that a kill left unwritten are written again from the record, and no reply of a
model is asked or paid for twice. A row's name is the SHA-256 of its line.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any


class CannotWrite(Exception):
    """The disk is full or a file cannot be written; what was finished before stands."""


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
    """The record beside a data file; the validation file shares its training file's."""
    stem = out.stem.removesuffix(".validation")
    return out.with_name(f"{stem}.provenance.jsonl")


def lines(path: Path) -> Iterator[bytes]:
    """Complete lines of a file, without newlines; a half-written last line is left out."""
    if path.exists():
        with path.open("rb") as stream:
            for line in stream:
                if line.endswith(b"\n"):
                    yield line[:-1]


class Growing:
    """A file of lines that is appended to; a half-written last line is cut off when it opens."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Unbuffered: a line is in the system's hands before the next step begins.
            self._stream = path.open("ab", buffering=0)
            self.repaired = self._repair()
        except OSError as error:
            raise CannotWrite(f"{path} cannot be written: {error.strerror}") from None

    def _repair(self) -> int:
        """Bytes cut off."""
        size = end = os.path.getsize(self.path)
        with self.path.open("rb") as stream:
            while end > 0:
                start = max(0, end - 65536)
                stream.seek(start)
                newline = stream.read(end - start).rfind(b"\n")
                if newline >= 0:
                    end = start + newline + 1
                    break
                end = start
        if end < size:
            os.truncate(self.path, end)
        return size - end

    def append(self, line: bytes) -> None:
        """Append one line, whole or not at all.

        Raises:
            CannotWrite: for example because the disk is full.
        """
        size = os.path.getsize(self.path)
        rest = memoryview(line)
        try:
            while rest:
                rest = rest[self._stream.write(rest) :]
        except OSError as error:
            with contextlib.suppress(OSError):
                os.truncate(self.path, size)
            raise CannotWrite(
                f"{self.path} cannot be written: {error.strerror}; what was finished before is "
                "kept, so make room and give the same command again"
            ) from None

    def close(self) -> None:
        with contextlib.suppress(OSError):
            os.fsync(self._stream.fileno())
        self._stream.close()


class Journal:
    """The record of one data file.

    Args:
        repair: cut off a half-written last line at once.

    Attributes:
        settings: of the build that began it; None where there is no record yet.
        units: unit name → its line.
        splits: document name → `train` or `validation`.
        short_tokens: name of each short row mixed in → its tokens.
        spent: (prompt, completion) tokens of all runs.
    """

    def __init__(self, out: Path, *, repair: bool = False) -> None:
        self.path = provenance_path(out)
        self.settings: dict[str, Any] | None = None
        self.units: dict[str, dict[str, Any]] = {}
        self.documents: set[str] = set()
        self.splits: dict[str, str] = {}
        self.short_tokens: dict[str, int] = {}
        self.spent = (0, 0)
        self._file = Growing(self.path) if repair and self.path.exists() else None
        for number, line in enumerate(lines(self.path), 1):
            try:
                self._take(json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError):
                raise ValueError(
                    f"{self.path}, line {number} is damaged; restore the file, or remove it and "
                    f"{out.name} to build anew"
                ) from None

    def _take(self, entry: dict[str, Any]) -> None:
        kind = entry["type"]
        if kind == "settings":
            self.settings = entry["settings"]
        elif kind == "document":
            self.documents.add(entry["digest"])
            self.splits.setdefault(entry["name"], entry["split"])
        elif kind == "unit":
            self.units[entry["unit"]] = entry
        elif kind == "short":
            self.short_tokens[entry["row"]] = entry["tokens"]
        spent = entry.get("spent")
        if spent:
            self.spent = (self.spent[0] + spent[0], self.spent[1] + spent[1])

    def write(self, entry: dict[str, Any]) -> None:
        """Record one finished step."""
        if self._file is None:
            self._file = Growing(self.path)
        self._file.append(line_of(entry))
        self._take(entry)

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class Rows:
    """The data file of one split: appends each row once.

    Args:
        repair: cut off a half-written last line at once, also where nothing will be appended.

    Attributes:
        names: names of the rows in the file.
    """

    def __init__(self, path: Path, *, repair: bool = False) -> None:
        self.path = path
        self._file = Growing(path) if repair and path.exists() else None
        self.names = {row_name(line) for line in lines(path)}

    def append(self, line: bytes) -> None:
        """Append a row whose name is not in `names` yet."""
        if self._file is None:
            self._file = Growing(self.path)
        self._file.append(line)
        self.names.add(row_name(line))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

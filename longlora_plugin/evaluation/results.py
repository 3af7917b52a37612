"""A JSON file of result rows that a killed run can go on with.

Each row carries `settings`, a digest of everything that decides its figures: weights, RoPE, data,
lengths, options. A row whose settings are asked for again is taken from the file. Rows that nobody
asks for stay; a row is replaced only by the answer to the same question.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from longlora_plugin.checkpoints.files import as_json, write_text

Row = dict[str, Any]


def settings_digest(settings: dict[str, Any]) -> str:
    """Digest of settings, the same for the same values in any order of keys."""
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class ResultFile:
    """The rows of a file, earlier and new ones.

    Args:
        path: None to keep nothing.

    Raises:
        ValueError: the file is something else and would be lost.
    """

    def __init__(self, path: str | Path | None) -> None:
        self._path = None if path is None else Path(path)
        self._earlier = [] if self._path is None else _read_rows(self._path)

    def by_settings(self) -> dict[str, Row]:
        """Earlier rows by their settings."""
        return {row["settings"]: row for row in self._earlier if "settings" in row}

    def save(self, rows: Iterable[Row], question: Sequence[str]) -> None:
        """Write earlier rows and these.

        Args:
            question: keys of a row that say what was asked: an earlier row that agrees with a new
                one in all of them is its older answer, and is replaced.
        """
        if self._path is None:
            return
        new = list(rows)
        answered = {_values(row, question) for row in new}
        kept = [row for row in self._earlier if _values(row, question) not in answered]
        write_text(self._path, as_json([*kept, *new]))


def _values(row: Row, keys: Sequence[str]) -> str:
    return json.dumps([row.get(key) for key in keys], default=str)


def _read_rows(path: Path) -> list[Row]:
    if not path.is_file() or not path.stat().st_size:
        return []
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} exists and is not a file of results: {error}") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} exists and is not a list of result rows; write to another file")
    return rows

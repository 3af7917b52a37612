"""A JSON file of result rows that a killed run can go on with.

Each row carries `settings`, a digest of everything that decides its figures: weights, RoPE, data,
lengths, options. A row whose settings are asked for again is taken from the file.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def settings_digest(settings: dict[str, Any]) -> str:
    """Digest of settings, the same for the same values in any order of keys."""
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_rows(path: str | Path | None) -> dict[str, Row]:
    """Rows of an earlier run by their settings; none where there is no file.

    Raises:
        ValueError: the file is something else and would be lost.
    """
    if path is None or not Path(path).exists() or not Path(path).stat().st_size:
        return {}
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} exists and is not a file of results: {error}") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} exists and is not a list of result rows; write to another file")
    return {row["settings"]: row for row in rows if "settings" in row}


def write_rows(path: str | Path, rows: Iterable[Row]) -> None:
    """Write rows so that the file is complete at every moment."""
    text = json.dumps(list(rows), indent=2, ensure_ascii=False) + "\n"
    write_whole(path, text.encode())


def write_whole(path: str | Path, content: bytes) -> None:
    """Write a file that is never seen half written."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(draft, 0o644)
        os.replace(draft, path)
    except BaseException:
        Path(draft).unlink(missing_ok=True)
        raise

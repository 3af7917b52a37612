"""Files of rows that exist already: JSONL, or one JSON list as LongAlpaca-12k is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from longlora_plugin.longqa.journal import line_of
from longlora_plugin.longqa.wordings import row_texts


def read_rows(path: Path) -> Iterator[tuple[str, bytes, dict[str, Any] | str]]:
    """Every row: where it is, its line, and the row itself or what is wrong with it.

    Raises:
        ValueError: the file cannot be read.
    """
    try:
        with path.open("rb") as stream:
            listed = stream.read(4096).lstrip()[:1] == b"["
            stream.seek(0)
            for number, line in enumerate(map(line_of, json.load(stream)) if listed else stream, 1):
                if line.strip():
                    yield f"row {number}", line, _row_in(line)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} begins a JSON list, but is not JSON: {error}") from None


def _row_in(line: bytes) -> dict[str, Any] | str:
    try:
        row: dict[str, Any] = json.loads(line)
    except UnicodeDecodeError:
        return "is not UTF-8; save the file as UTF-8"
    except (ValueError, RecursionError) as error:
        return f"is not JSON: {error}"
    try:
        row_texts(row)
    except ValueError as error:
        return str(error)
    return row


def read_short(path: Path) -> list[dict[str, Any]]:
    """Short instructions that are mixed in, so that short skills are kept.

    Raises:
        ValueError: the file cannot be read, or a row is no instruction; names it.
    """
    rows = []
    for where, _, row in read_rows(path):
        if isinstance(row, str):
            raise ValueError(f"--short {path}, {where} {row}")
        rows.append(row)
    if not rows:
        raise ValueError(f"--short {path} holds no rows; give short instructions, one a line")
    return rows

"""Short instructions that are mixed in, so that short skills are kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from longlora_plugin.longqa.wordings import row_texts


def read_short(path: Path) -> list[dict[str, Any]]:
    """Rows of a file of short instructions: JSONL, or one JSON list.

    Raises:
        ValueError: the file is missing, or a row is no instruction; names the line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"--short {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"--short {path} is not UTF-8; save it as UTF-8") from None
    try:
        if text.lstrip().startswith("["):
            numbered = list(enumerate(json.loads(text), 1))
        else:
            numbered = [
                (number, json.loads(line))
                for number, line in enumerate(text.split("\n"), 1)
                if line.strip()
            ]
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"--short {path} is not JSON or JSONL: {error}") from None
    rows = []
    for number, row in numbered:
        if not isinstance(row, dict):
            raise ValueError(f"--short {path}, row {number} is {row!r:.60}, not an object")
        try:
            row_texts(row)
        except ValueError as error:
            raise ValueError(f"--short {path}, row {number} {error}") from None
        rows.append(row)
    if not rows:
        raise ValueError(f"--short {path} holds no rows; give short instructions, one a line")
    return rows

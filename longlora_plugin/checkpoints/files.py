"""Files written whole or not at all, so that a killed process leaves the earlier version."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path to write to; it takes the place of `path` when the block ends without an error."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file, sorted and indented, in one step."""
    with whole_file(path) as partial:
        text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False)
        partial.write_text(text + "\n", encoding="utf-8")


def write_text(path: Path, text: str) -> None:
    """Write a text file in one step; a link keeps its place, a device or a pipe is written to."""
    path = path.resolve()
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def check_writable(path: Path) -> None:
    """Find out before long work whether its result can be written; leaves no trace in the file.

    Raises:
        ValueError: says why not.
    """
    target = path.resolve()
    try:
        if target.is_dir():
            raise IsADirectoryError(0, "it is a folder")
        if target.exists():
            with target.open("ab"):
                pass
        if target.is_file() or not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=target.parent):
                pass
    except OSError as error:
        raise ValueError(
            f"cannot write {path}: {error.strerror}; give a file in a folder you may write to"
        ) from None

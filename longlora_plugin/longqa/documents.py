"""Documents, the files that they come from, and the limits of reading them."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from longlora_plugin.longqa.options import option

KINDS = ("paper", "book", "report")
"""Kinds of documents; each has wordings of its own."""

TEXT_PER_FILE = 4
"""A file may give this many times the size limit as text; more is a decompression bomb."""


class Unreadable(ValueError):
    """Why one file gives no document; its message goes to the report."""


@dataclass(frozen=True)
class Document:
    """One readable document.

    Attributes:
        name: path below the folder given, with `/`.
        text: normalised text; paragraphs are separated by an empty line.
        style: `plain` or `markdown`: how sections are found.
        kind: one of KINDS.
        breaks: where sections begin that the format itself declares, as character offsets.
    """

    name: str
    text: str
    style: str
    kind: str
    breaks: tuple[int, ...] = ()

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the text with runs of white space made one space, in hex."""
        return hashlib.sha256(" ".join(self.text.split()).encode()).hexdigest()


def find_files(source: Path) -> list[Path]:
    """The files to read, in a fixed order: hidden files and folders are left out.

    Folders that are links or cannot be listed are among them, so that reading them says so.

    Raises:
        FileNotFoundError: `source` does not exist.
    """
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist; give a file or a folder of documents")
    if not source.is_dir():
        return [source]
    found: list[Path] = []
    unlisted: list[OSError] = []
    for folder, names, files in os.walk(source, onerror=unlisted.append):
        names[:] = sorted(name for name in names if not name.startswith("."))
        links = [name for name in names if os.path.islink(os.path.join(folder, name))]
        found += [Path(folder) / name for name in [*files, *links] if not name.startswith(".")]
    found += [Path(error.filename) for error in unlisted]
    return sorted(found, key=lambda path: path.relative_to(source).as_posix())


@dataclass(frozen=True)
class Limits:
    """How files are read; `kind` is one of KINDS for every document, or None: judged for each."""

    max_file_mb: float = option(64.0, "Larger files are skipped unread.")
    read_seconds: float = option(120.0, "Longest time for reading one file.")
    encoding: str | None = option(None, "Encoding of text files that are not UTF-8; else detected.")
    kind: str | None = None

    @property
    def max_bytes(self) -> int:
        """Largest file that is read, in bytes."""
        return int(self.max_file_mb * 1_000_000)

    @property
    def max_text(self) -> int:
        """Longest document, in characters."""
        return TEXT_PER_FILE * self.max_bytes

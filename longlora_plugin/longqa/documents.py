"""Readers: a file becomes text and where its parts begin; a bad file becomes one clear reason.

Every format is read by a library (pypdf, markitdown for HTML and EPUB, markdown-it, pygments,
chardet). Formats with a parser are read in a child process (`parsers`).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import statistics
import subprocess
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longlora_plugin.longqa.decoding import Unreadable, decode
from longlora_plugin.longqa.parsers import start_child

KINDS = ("paper", "book", "report", "code")
"""Kinds of documents; each has wordings of its own."""

MAX_FILE_MB = 64
"""Default for the largest file that is read, in MB."""

READ_SECONDS = 120.0
"""Default for the longest a parser may work at one file, in seconds."""

TEXT_PER_FILE = 4
"""A file may give this many times the size limit as text; more is a decompression bomb."""

_FORMATS = {
    ".txt": "plain",
    ".text": "plain",
    ".rst": "plain",
    ".tex": "plain",
    ".md": "markdown",
    ".markdown": "markdown",
    ".html": "html",
    ".htm": "html",
    ".xhtml": "html",
    ".pdf": "pdf",
    ".epub": "epub",
}
_PARSED_APART = ("pdf", "epub", "html")
# pygments has lexers for these too, but they hold data, not something to ask questions about.
_DATA_LANGUAGES = {"json", "json5", "jsonld", "xml", "yaml", "toml", "ini", "properties", "diff"}
_DATA_LANGUAGES |= {"text", "output", "csv", "genshi", "html", "svg", "po", "debcontrol"}


@dataclass(frozen=True)
class Document:
    """One readable document.

    Attributes:
        name: path below the folder given, with `/`.
        text: normalised text; paragraphs are separated by an empty line.
        style: `plain`, `markdown` or `code`: how sections and sentences are found.
        kind: one of KINDS.
        title: what the file calls itself, else its name.
        breaks: (character offset in `text`, title) of sections that the format itself declares.
        language: pygments' name of the programming language; None for prose.
        digest: SHA-256 of the text with runs of white space made one space, in hex.
    """

    name: str
    text: str
    style: str
    kind: str
    title: str
    breaks: tuple[tuple[int, str], ...] = ()
    language: str | None = None
    digest: str = field(default="")

    def __post_init__(self) -> None:
        flat = " ".join(self.text.split())
        object.__setattr__(self, "digest", hashlib.sha256(flat.encode()).hexdigest())


def find_files(source: Path) -> list[Path]:
    """The files to read, in a fixed order: hidden files and folders are left out.

    Raises:
        FileNotFoundError: `source` does not exist.
    """
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist; give a file or a folder of documents")
    if not source.is_dir():
        return [source]
    found = []
    for folder, names, files in os.walk(source):
        names[:] = sorted(name for name in names if not name.startswith("."))
        found += [Path(folder) / name for name in files if not name.startswith(".")]
    return sorted(found, key=lambda path: path.relative_to(source).as_posix())


class Reader:
    """Reads files; holds the child process that parses PDF, EPUB and HTML.

    Args:
        max_file_mb: larger files are refused before a byte is read.
        seconds: how long the child may work at one file.
        encoding: of text files that are not UTF-8; None: detected for each.

    Attributes:
        kind: one of KINDS for every document; None: judged for each document.
    """

    def __init__(
        self,
        *,
        max_file_mb: float = MAX_FILE_MB,
        seconds: float = READ_SECONDS,
        encoding: str | None = None,
    ) -> None:
        self.max_bytes = int(max_file_mb * 1_000_000)
        self.seconds = seconds
        self.encoding = encoding
        self.kind: str | None = None
        self._child: subprocess.Popen[bytes] | None = None
        self._lines = ThreadPoolExecutor(1)

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop_child()
        self._lines.shutdown()

    def read(self, path: Path, name: str) -> Document:
        """The document in `path`.

        Raises:
            Unreadable: says why, and what to do about it where something can be done.
        """
        try:
            form, language = self._format(path)
            if form in _PARSED_APART:
                got = self._parse_apart(path, form)
            else:
                text = decode(path.read_bytes(), self.encoding)
                got = {"text": text, "title": None, "breaks": []}
        except OSError as error:
            raise Unreadable(f"cannot be read: {error.strerror or error}") from None
        limit = TEXT_PER_FILE * self.max_bytes
        if len(got["text"]) > limit:
            raise Unreadable(
                f"gives {len(got['text']):,} characters of text, more than {limit:,} "
                f"({TEXT_PER_FILE} × --max-file-mb); split it, or raise --max-file-mb"
            )
        return _document(name, form, language, got, self.kind)

    def _format(self, path: Path) -> tuple[str, str | None]:
        if not path.is_file():
            raise Unreadable("is not a regular file")
        size = path.stat().st_size
        if size == 0:
            raise Unreadable("is empty (0 bytes)")
        if size > self.max_bytes:
            raise Unreadable(
                f"is {size / 1e6:,.1f} MB, above the limit of {self.max_bytes / 1e6:g} MB; "
                f"split it, or write --max-file-mb {size // 1_000_000 + 1}"
            )
        with path.open("rb") as stream:
            head = stream.read(64)
        if head.startswith(b"%PDF-"):
            return "pdf", None
        if head.startswith(b"PK\x03\x04") and b"application/epub+zip" in head:
            return "epub", None
        form = _FORMATS.get(path.suffix.lower())
        if form:
            return form, None
        return _code_or_plain(path)

    def _parse_apart(self, path: Path, form: str) -> dict[str, Any]:
        child = self._child = self._child or start_child(TEXT_PER_FILE * self.max_bytes)
        assert child.stdin is not None
        assert child.stdout is not None
        request = json.dumps(
            {"path": str(path.absolute()), "format": form, "encoding": self.encoding}
        )
        line: Future[bytes] = self._lines.submit(child.stdout.readline)
        try:
            child.stdin.write(request.encode() + b"\n")
            child.stdin.flush()
            reply = line.result(self.seconds)
        except FutureTimeout:
            self._stop_child()
            raise Unreadable(
                f"took longer than {self.seconds:g} s to parse; split it, or raise --read-seconds"
            ) from None
        except OSError:
            reply = b""
        if not reply.endswith(b"\n"):
            self._stop_child()
            raise Unreadable(f"crashed the {form.upper()} parser; it is damaged or a bomb")
        got: dict[str, Any] = json.loads(reply)
        if "error" in got:
            raise Unreadable(got["error"])
        return got

    def _stop_child(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.communicate()
            self._child = None


def _code_or_plain(path: Path) -> tuple[str, str | None]:
    from pygments.lexers import find_lexer_class_for_filename

    lexer = find_lexer_class_for_filename(path.name)
    if lexer is None:
        if path.suffix and not re.fullmatch(r"\.\d+", path.suffix):
            raise Unreadable(f"is of a type that is not read ({path.suffix})")
        return "plain", None
    aliases = set(lexer.aliases)
    if aliases & _DATA_LANGUAGES:
        raise Unreadable(f"holds data ({lexer.name}), not a text to ask questions about")
    return "code", lexer.aliases[0]


def _document(
    name: str, form: str, language: str | None, got: dict[str, Any], kind: str | None
) -> Document:
    style = {"code": "code", "plain": "plain", "pdf": "plain"}.get(form, "markdown")
    # A lone surrogate, as broken fonts in PDFs give, cannot be written as UTF-8.
    text = got["text"].encode("utf-8", "replace").decode()
    text = re.sub(r"\r\n?|\f|\u2028|\u2029", "\n", text).replace("\x00", "")
    text = "\n".join(line.rstrip() for line in text.split("\n"))
    breaks = [(int(offset), str(title)) for offset, title in got["breaks"]]
    if style == "markdown":
        text = _unwrap_markdown(text)
    elif form == "plain":
        text = _unwrap_plain(text)
    if not breaks:
        text = re.sub(r"\n{3,}", "\n\n", text).strip("\n")
    if not re.search(r"\w", text):
        if form == "pdf":
            raise Unreadable(
                "holds no text (a scan?); run OCR on it first, for example with ocrmypdf"
            )
        raise Unreadable("is empty (no words)")
    heading = re.search(r"(?m)^#+ +(.+)$", text) if style == "markdown" else None
    title = got["title"] or (heading.group(1) if heading else None) or Path(name).stem
    return Document(
        name=name,
        text=text,
        style=style,
        kind=kind or ("book" if form == "epub" else kind_of(text, style)),
        title=" ".join(str(title).split())[:200],
        breaks=tuple(breaks),
        language=language,
    )


_CHAPTER = re.compile(
    r"(?im)^#*\s*(chapter|book|act|canto|volume)\b[ .]*([ivxlc\d]+|the|one|first)\b"
)


def kind_of(text: str, style: str) -> str:
    """The kind of a document (one of KINDS), from what stands in it."""
    if style == "code":
        return "code"
    start = text[: max(6000, len(text) // 10)]
    has_abstract = re.search(r"(?im)^\W*abstract\b", start)
    if has_abstract and re.search(r"(?im)^[\W\d]*(references|bibliography)\W*$", text):
        return "paper"
    if len(_CHAPTER.findall(text)) >= 3 or len(text) > 250_000:
        return "book"
    return "report"


def _unwrap_plain(text: str) -> str:
    paragraphs = []
    for paragraph in re.split(r"\n{2,}", text):
        lines = paragraph.split("\n")
        inner = [len(line) for line in lines[:-1]]
        # Hard-wrapped prose has long lines of much the same length; verse and lists have not.
        wrapped = inner and 55 <= statistics.median(inner) <= 100 and max(inner) <= 110
        if wrapped and not any(re.match(r"\s{4,}|[-*•]\s|\d+[.)]\s", line) for line in lines[1:]):
            paragraph = " ".join(line.strip() for line in lines)
        paragraphs.append(paragraph)
    return "\n\n".join(paragraphs)


def _unwrap_markdown(text: str) -> str:
    from markdown_it import MarkdownIt

    lines = text.split("\n")
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        if token.type == "paragraph_open" and token.level == 0 and token.map:
            first, end = token.map
            if end - first > 1:
                lines[first] = " ".join(line.strip() for line in lines[first:end])
                lines[first + 1 : end] = [""] * (end - first - 1)
    return "\n".join(lines)

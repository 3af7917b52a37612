"""Parsers of every format, for the worker process of `reader.Reader`."""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import re
import signal
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from longlora_plugin.longqa.documents import Document, Limits, Unreadable
from longlora_plugin.longqa.optional import INSTALL
from longlora_plugin.longqa.scripts import join_lines, width

WORKER_MEMORY_BYTES = 4 << 30
_PR_SET_PDEATHSIG = 1

Parsed = tuple[str, list[int]]
"""A text, and the offsets in it at which sections begin."""


def prepare_worker() -> None:
    """Limit this process: its memory, its output, and its life to that of its parent."""
    # BLAS reserves address space for each thread, which would count against the memory cap.
    os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
    # Ctrl-C is for the build, which ends the worker itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (WORKER_MEMORY_BYTES, WORKER_MEMORY_BYTES))
    # Libraries may print, which would break the progress display.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)


def read_document(path: Path, name: str, form: str, limits: Limits) -> Document:
    """The document in `path`, which is in format `form`.

    Raises:
        Unreadable: says why.
    """
    try:
        text, breaks = _PARSERS[form](path, limits)
        if len(text) > limits.max_text:
            raise Unreadable(
                f"gives more than {limits.max_text:,} characters of text; split it, or raise "
                "--max-file-mb"
            )
        return _document(name, form, text, breaks, limits.kind)
    except Unreadable:
        raise
    except OSError as error:
        raise Unreadable(f"cannot be read: {error.strerror or error}") from None
    except ImportError as error:
        raise Unreadable(f"needs {error.name or error}; {INSTALL}") from None
    except MemoryError:
        raise Unreadable(f"needs more than {WORKER_MEMORY_BYTES >> 30} GB to parse") from None
    except Exception as error:
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise Unreadable(f"is not a readable {form.upper()} file: {said}") from None


def _parse_text(path: Path, limits: Limits) -> Parsed:
    with path.open("rb") as stream:
        return _decode(stream.read(limits.max_bytes), limits.encoding), []


def _decode(raw: bytes, encoding: str | None) -> str:
    """Text of `raw`: UTF-8 (with or without a mark), else `encoding`, else what is detected."""
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        from chardet import detect

        name = encoding or detect(raw, max_bytes=len(raw))["encoding"]
        try:
            text = raw.decode(name or "ascii").removeprefix("\ufeff")
        except (UnicodeDecodeError, LookupError):
            raise Unreadable(
                f"is neither UTF-8 nor {name}; save it as UTF-8"
                if name
                else "is in no known encoding (it may not be text); save it as UTF-8"
            ) from None
    strange = sum(1 for char in text[:200_000] if not (char.isprintable() or char in "\t\n\r\f"))
    if strange > 0.01 * min(len(text), 200_000):
        raise Unreadable("is binary, not text")
    return text


def _parse_pdf(path: Path, limits: Limits) -> Parsed:
    from pypdf import PdfReader
    from pypdf.errors import DependencyError, LimitReachedError

    try:
        reader = PdfReader(path)
        if reader.is_encrypted and not reader.decrypt(""):
            raise Unreadable("is encrypted; save a copy without a password, for example with qpdf")
        pages, size = [], 0
        for page in reader.pages:
            pages.append(_reflow_page(page.extract_text()))
            size += len(pages[-1])
            if size > limits.max_text:
                break
    except LimitReachedError as error:
        raise Unreadable(f"expands beyond pypdf's limits (a PDF bomb?): {error}") from None
    except DependencyError:
        raise Unreadable(
            "is encrypted; save a copy without a password, for example with qpdf"
        ) from None
    starts, offset = [], 0
    for text in pages:
        starts.append(offset)
        offset += len(text) + 2 if text else 0
    breaks = {starts[page] for page in _outline(reader) if page < len(starts)}
    return "\n\n".join(filter(None, pages)), sorted(breaks)


def _outline(reader: Any) -> list[int]:
    """Pages on which a section begins."""
    found: list[int] = []

    def walk(entries: list[Any]) -> None:
        for entry in entries:
            if isinstance(entry, list):
                walk(entry)
                continue
            page = reader.get_destination_page_number(entry)
            if page is not None and page >= 0:
                found.append(page)

    # A damaged outline costs the sections, never the text.
    with contextlib.suppress(Exception):
        walk(reader.outline)
    return found


def _reflow_page(text: str) -> str:
    """A PDF page's lines as paragraphs; PDF keeps no paragraphs, only lines at places."""
    # Lengths must stay as they are from here on: section breaks are offsets into this text.
    text = re.sub(r"\r\n?|\f", "\n", text.replace("\x00", ""))
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if not lines:
        return ""
    usual = statistics.median(len(line) for line in lines)
    paragraphs: list[str] = []
    running = ""
    for line in lines:
        if re.search(r"[a-z]-$", running) and re.match(r"[a-z]", line):
            running = running[:-1] + line
        else:
            running = join_lines([running, line]) if running else line
        ends = re.search(r"[.!?:”\"。！？」।؟]$", line) and len(line) < 0.8 * usual
        heading = running == line and len(line) < 0.6 * usual and not re.search(r"[,;-]$", line)
        if ends or heading:
            paragraphs.append(running)
            running = ""
    if running:
        paragraphs.append(running)
    return "\n\n".join(paragraphs)


def _parse_html(path: Path, limits: Limits) -> Parsed:
    from markitdown import StreamInfo
    from markitdown.converters import HtmlConverter

    # Links and pictures are stripped: their addresses are noise in a text to read.
    stream = io.BytesIO(_parse_text(path, limits)[0].encode())
    got = HtmlConverter().convert(
        stream, StreamInfo(charset="utf-8", extension=".html"), strip=["a", "img"]
    )
    return got.markdown, []


def _parse_epub(path: Path, limits: Limits) -> Parsed:
    import zipfile

    from markitdown import StreamInfo
    from markitdown.converters import EpubConverter

    with zipfile.ZipFile(path) as book:
        entries = [entry for entry in book.infolist() if not _is_picture(entry.filename)]
        unpacked = sum(entry.file_size for entry in entries)
        if unpacked > 2 * limits.max_text:
            raise Unreadable(f"unpacks to {unpacked / 1e6:,.0f} MB of text (a bomb?)")
        if any(entry.flag_bits & 1 for entry in entries):
            raise Unreadable("is encrypted; save a copy without a password")
    with path.open("rb") as stream:
        got = EpubConverter().convert(stream, StreamInfo(extension=".epub"), strip=["a", "img"])
    return got.markdown, []


def _is_picture(name: str) -> bool:
    kinds = (".jpg", ".jpeg", ".png", ".gif", ".svg", ".webp", ".ttf", ".otf", ".woff", ".woff2")
    return name.lower().endswith((*kinds, ".mp3", ".mp4"))


_PARSERS: dict[str, Callable[[Path, Limits], Parsed]] = {
    "plain": _parse_text,
    "markdown": _parse_text,
    "html": _parse_html,
    "pdf": _parse_pdf,
    "epub": _parse_epub,
}


def _document(name: str, form: str, text: str, breaks: list[int], kind: str | None) -> Document:
    style = "plain" if form in ("plain", "pdf") else "markdown"
    # A lone surrogate, as broken fonts in PDFs give, cannot be written as UTF-8.
    text = text.encode("utf-8", "replace").decode()
    text = re.sub(r"\r\n?|\f|\u2028|\u2029", "\n", text).replace("\x00", "")
    text = "\n".join(line.rstrip() for line in text.split("\n"))
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
    if style == "markdown":
        breaks = _markdown_headings(text)
    return Document(
        name=name,
        text=text,
        style=style,
        kind=kind or ("book" if form == "epub" else kind_of(text)),
        breaks=tuple(breaks),
    )


_CHAPTER = re.compile(
    r"(?im)^#*[ \t]*(?:(?:chapter|book|act|canto|volume)\b[ .]*(?:[ivxlc\d]+|the|one|first)\b"
    r"|第[〇一二三四五六七八九十百\d]+[章回節节卷話话]|제 ?\d+ ?[장부편화]|บทที่ ?[\d๐-๙]|अध्याय ?\S"
    r"|الفصل \S)"
)


def kind_of(text: str) -> str:
    """The kind of a document (one of KINDS), from its text."""
    start = text[: max(6000, len(text) // 10)]
    has_abstract = re.search(r"(?im)^[^\w\n]*abstract\b", start)
    if has_abstract and re.search(
        r"(?im)^(?:[^\w\n]|\d)*(?:references|bibliography)[^\w\n]*$", text
    ):
        return "paper"
    if len(_CHAPTER.findall(text)) >= 3 or len(text) > 250_000:
        return "book"
    return "report"


def _unwrap_plain(text: str) -> str:
    paragraphs = []
    for paragraph in re.split(r"\n{2,}", text):
        lines = paragraph.split("\n")
        inner = [width(line, wide=2) for line in lines[:-1]]
        # Hard-wrapped prose has long lines of much the same length; verse and lists have not.
        wrapped = inner and 55 <= statistics.median(inner) <= 100 and max(inner) <= 110
        if wrapped and not any(re.match(r"\s{4,}|[-*•]\s|\d+[.)]\s", line) for line in lines[1:]):
            paragraph = join_lines([line.strip() for line in lines])
        paragraphs.append(paragraph)
    return "\n\n".join(paragraphs)


def _unwrap_markdown(text: str) -> str:
    from markdown_it import MarkdownIt

    lines = text.split("\n")
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        if token.type == "paragraph_open" and token.level == 0 and token.map:
            first, end = token.map
            if end - first > 1:
                lines[first] = join_lines([line.strip() for line in lines[first:end]])
                lines[first + 1 : end] = [""] * (end - first - 1)
    return "\n".join(lines)


def _markdown_headings(text: str) -> list[int]:
    from markdown_it import MarkdownIt

    offsets = [0]
    for line in text.split("\n"):
        offsets.append(offsets[-1] + len(line) + 1)
    tokens = MarkdownIt("commonmark").parse(text)
    return [
        offsets[token.map[0]]
        for token in tokens
        if token.type == "heading_open" and token.level == 0 and token.map
    ]

"""Readers: a file becomes text and where its parts begin; a bad file becomes one clear reason.

Every format is read by a library (pypdf, markitdown for HTML and EPUB, markdown-it, pygments,
chardet). Formats with a parser (PDF, EPUB, HTML) are read in a child process with a
memory cap and a time limit: what a broken or hostile file does there ends with the child, not with
a build of many hours. The child speaks one JSON line a file: `{"path", "format", "encoding"}` in,
`{"text", "title", "breaks"}` or `{"error"}` out.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import json
import os
import re
import statistics
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

KINDS = ("paper", "book", "report", "code")
"""Kinds of documents; each has wordings of its own."""

MAX_FILE_MB = 64
"""Default for the largest file that is read, in MB."""

READ_SECONDS = 120.0
"""Default for the longest a parser may work at one file, in seconds."""

CHILD_MEMORY_BYTES = 4 << 30
TEXT_PER_FILE = 4
"""A file may give this many times the size limit as text; more is a decompression bomb."""

INSTALL = "pip install 'longlora-plugin[longqa]'"

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


def require(package: str, purpose: str) -> Any:
    """Import an optional package.

    Raises:
        ValueError: it is not installed; says the line that installs it.
    """
    try:
        return importlib.import_module(package)
    except ImportError:
        raise ValueError(f"{purpose} needs {package}; {INSTALL}") from None


class Unreadable(ValueError):
    """Why one file gives no document; its message goes to the report."""


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
        child = self._child = self._child or _start_child(TEXT_PER_FILE * self.max_bytes)
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


def decode(raw: bytes, encoding: str | None = None) -> str:
    """Text of `raw`: UTF-8 (with or without a mark), else `encoding`, else what is detected.

    Args:
        encoding: of files that are not UTF-8; None: chardet judges.

    Raises:
        Unreadable: no known encoding, or the bytes are no text.
    """
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        name = encoding or _detect(raw)
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


def _detect(raw: bytes) -> str | None:
    from chardet import detect

    wide = b"\x00" in raw[:1000] or raw.startswith((b"\xff\xfe", b"\xfe\xff"))
    if wide:
        return detect(raw[:100_000])["encoding"]
    # Only lines beyond ASCII tell encodings apart, and they may come late in a long file.
    telling = b"\n".join(re.findall(rb"[^\n]*[\x80-\xff][^\n]*", raw)[:2000])
    found = detect(telling[:100_000])["encoding"]
    foreign = len(re.findall(rb"[\x80-\xff]", raw))
    if found and foreign < 0.04 * len(raw):
        # A few quotation marks and dashes are too little to judge by; this is what they mostly are.
        with contextlib.suppress(UnicodeDecodeError):
            raw.decode("cp1252")
            return "cp1252"
    return found


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


def _start_child(max_text: int) -> subprocess.Popen[bytes]:
    # BLAS reserves address space for each thread, which would count against the memory cap.
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    environment = {**os.environ, **threads, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        [sys.executable, "-m", __name__, str(max_text)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        # Ctrl-C is for the build, which ends the child itself.
        start_new_session=True,
    )


def _serve(requests: IO[str], replies: IO[str], max_text: int) -> None:
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (CHILD_MEMORY_BYTES, CHILD_MEMORY_BYTES))
    parsers = {"pdf": _parse_pdf, "epub": _parse_epub, "html": _parse_html}
    for line in requests:
        request = json.loads(line)
        form = request["format"]
        try:
            reply = parsers[form](Path(request["path"]), max_text, request["encoding"])
        except Unreadable as error:
            reply = {"error": str(error)}
        except ImportError as error:
            reply = {"error": f"needs {error.name or error}; {INSTALL}"}
        except MemoryError:
            reply = {"error": f"needs more than {CHILD_MEMORY_BYTES >> 30} GB of memory to parse"}
        except Exception as error:
            said = " ".join(str(error).split())[:200] or type(error).__name__
            reply = {"error": f"is not a readable {form.upper()} file: {said}"}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def _parse_pdf(path: Path, max_text: int, encoding: str | None) -> dict[str, Any]:
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
            if size > max_text:
                raise Unreadable(f"gives more than {max_text:,} characters of text")
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
    breaks = {starts[page]: name for page, name in _outline(reader) if page < len(starts)}
    return {
        "text": "\n\n".join(filter(None, pages)),
        "title": reader.metadata.title if reader.metadata else None,
        "breaks": sorted(breaks.items()),
    }


def _outline(reader: Any) -> list[tuple[int, str]]:
    found: list[tuple[int, str]] = []

    def walk(entries: list[Any]) -> None:
        for entry in entries:
            if isinstance(entry, list):
                walk(entry)
                continue
            page = reader.get_destination_page_number(entry)
            if page is not None and page >= 0:
                found.append((page, str(entry.title)))

    # A damaged outline costs the section titles, never the text.
    with contextlib.suppress(Exception):
        walk(reader.outline)
    return found[::-1]


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
            running = f"{running} {line}".strip()
        ends = re.search(r"[.!?:”\"]$", line) and len(line) < 0.8 * usual
        heading = running == line and len(line) < 0.6 * usual and not re.search(r"[,;-]$", line)
        if ends or heading:
            paragraphs.append(running)
            running = ""
    if running:
        paragraphs.append(running)
    return "\n\n".join(paragraphs)


def _parse_html(path: Path, max_text: int, encoding: str | None) -> dict[str, Any]:
    from markitdown import StreamInfo
    from markitdown.converters import HtmlConverter

    # Links and pictures are stripped: their addresses are noise in a text to read.
    stream = io.BytesIO(decode(path.read_bytes(), encoding).encode())
    got = HtmlConverter().convert(
        stream, StreamInfo(charset="utf-8", extension=".html"), strip=["a", "img"]
    )
    return {"text": got.markdown, "title": got.title, "breaks": []}


def _parse_epub(path: Path, max_text: int, encoding: str | None) -> dict[str, Any]:
    import zipfile

    from markitdown import StreamInfo
    from markitdown.converters import EpubConverter

    with zipfile.ZipFile(path) as book:
        entries = [entry for entry in book.infolist() if _is_epub_text(entry.filename)]
        unpacked = sum(entry.file_size for entry in entries)
        if unpacked > 2 * max_text:
            raise Unreadable(f"unpacks to {unpacked / 1e6:,.0f} MB of text (a bomb?)")
        if any(entry.flag_bits & 1 for entry in entries):
            raise Unreadable("is encrypted; save a copy without a password")
    with path.open("rb") as stream:
        got = EpubConverter().convert(stream, StreamInfo(extension=".epub"), strip=["a", "img"])
    return {"text": got.markdown, "title": got.title, "breaks": []}


def _is_epub_text(name: str) -> bool:
    return name.lower().endswith((".xhtml", ".html", ".htm", ".xml", ".opf", ".ncx"))


if __name__ == "__main__":
    # Libraries may print; only replies belong on the pipe.
    pipe, sys.stdout = sys.stdout, sys.stderr
    _serve(sys.stdin, pipe, int(sys.argv[1]))

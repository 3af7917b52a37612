"""Parsers of PDF, EPUB and HTML, and the child process that they run in.

The child has a memory cap, and its parent a time limit: what a broken or hostile file does there
ends with the child, not with a build of many hours. It speaks one JSON line a file: `{"path",
"format", "encoding"}` in, `{"text", "title", "breaks"}` or `{"error"}` out.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import IO, Any

from longlora_plugin.longqa.decoding import Unreadable, decode
from longlora_plugin.longqa.optional import INSTALL

CHILD_MEMORY_BYTES = 4 << 30


def start_child(max_text: int) -> subprocess.Popen[bytes]:
    """The process that parses; of each file it gives at most some `max_text` characters."""
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

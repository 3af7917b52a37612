"""What the LongQA tests share: made documents in every format, and a stub of a model's server."""

from __future__ import annotations

import contextlib
import json
import random
import re
import sqlite3
import threading
import time
import zipfile
import zlib
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import tiny

from longlora_plugin.longqa.journal import provenance_path, validation_path

PEOPLE = ("Miriam", "Tobias", "Ottilie", "Gregor", "Wanda", "Lucan", "Petra", "Anselm")
PLACES = ("Brennick", "Halmouth", "Ostervik", "Carrowdale", "Pellmar", "Windlestone")
THINGS = ("lantern", "bridge", "ledger", "orchard", "harbour", "violin", "mirror", "carriage")
DEEDS = ("mended", "painted", "carried", "watched", "forgot", "measured", "buried", "praised")


def story(seed: int, chapters: int = 4, paragraphs: int = 6) -> str:
    """A made-up story with chapters, names, speech and numbers; every sentence stands once."""
    rng = random.Random(seed)
    lines = [f"The Chronicle of {rng.choice(PLACES)} number {seed}"]
    number = 1000 * (seed + 1)
    for chapter in range(1, chapters + 1):
        lines.append(f"CHAPTER {chapter}")
        for _ in range(paragraphs):
            told = []
            for _ in range(3):
                number += rng.randint(1, 9)
                who, other = rng.sample(PEOPLE, 2)
                thing, deed = rng.choice(THINGS), rng.choice(DEEDS)
                place = rng.choice(PLACES)
                told.append(
                    rng.choice(
                        (
                            f"In the year {number} old {who} {deed} the {thing} of {place}.",
                            f"Nobody but {who} knew that {other} {deed} {number} pieces of it.",
                            f"The road to {place} was {number} paces long, and {who} {deed} "
                            f"a {thing} there.",
                            f"“We have {number} reasons to keep the {thing},” said {who}.",
                        )
                    )
                )
            lines.append(" ".join(told))
    return "\n\n".join(lines)


def pdf(pages: list[list[str]], outline: list[tuple[str, int]] = ()) -> bytes:
    """A PDF with one line of Helvetica for each string; outline: (title, page)."""
    objects = ["<</Type/Catalog/Pages 2 0 R/Outlines 4 0 R>>", "", "", ""]
    objects[2] = "<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>"
    kids = []
    for lines in pages:
        shown = " ".join(
            "({}) Tj T*".format(line.replace("\\", r"\\").replace("(", r"\(").replace(")", r"\)"))
            for line in lines
        )
        content = f"BT /F1 11 Tf 14 TL 50 780 Td {shown} ET"
        objects.append(f"<</Length {len(content)}>>\nstream\n{content}\nendstream")
        kids.append(len(objects) + 1)
        objects.append(
            "<</Type/Page/Parent 2 0 R/MediaBox[0 0 595 842]/Resources<</Font<</F1 3 0 R>>>>"
            f"/Contents {len(objects)} 0 R>>"
        )
    objects[1] = f"<</Type/Pages/Count {len(kids)}/Kids[{' '.join(f'{k} 0 R' for k in kids)}]>>"
    first = len(objects) + 1
    for place, (title, page) in enumerate(outline):
        after = f"/Next {first + place + 1} 0 R" if place + 1 < len(outline) else ""
        objects.append(f"<</Title({title})/Parent 4 0 R/Dest[{kids[page]} 0 R/Fit]{after}>>")
    objects[3] = (
        f"<</Type/Outlines/First {first} 0 R/Last {len(objects)} 0 R/Count {len(outline)}>>"
        if outline
        else "<</Type/Outlines/Count 0>>"
    )
    return _assemble([text.encode("latin-1") for text in objects])


def pdf_bomb(unpacked_mb: int) -> bytes:
    """A small PDF whose page content unpacks to so many MB."""
    packer = zlib.compressobj(9)
    block = b" " * 1_000_000
    packed = b"".join(packer.compress(block) for _ in range(unpacked_mb)) + packer.flush()
    head = f"<</Length {len(packed)}/Filter/FlateDecode>>\nstream\n".encode()
    return _assemble(
        [
            b"<</Type/Catalog/Pages 2 0 R>>",
            b"<</Type/Pages/Count 1/Kids[4 0 R]>>",
            head + packed + b"\nendstream",
            b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 595 842]/Contents 3 0 R/Resources"
            b"<</Font<</F1<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>>>>>>>",
        ]
    )


def _assemble(objects: list[bytes]) -> bytes:
    out = b"%PDF-1.5\n"
    places = []
    for number, body in enumerate(objects, 1):
        places.append(len(out))
        out += f"{number} 0 obj\n".encode() + body + b"\nendobj\n"
    table = "".join(f"{place:010d} 00000 n \n" for place in places)
    start = len(out)
    out += f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}".encode()
    out += f"trailer\n<</Size {len(objects) + 1}/Root 1 0 R>>\nstartxref\n{start}\n%%EOF".encode()
    return out


def epub(path: Path, title: str, chapters: list[str]) -> None:
    """An EPUB with one XHTML file for each chapter (HTML body)."""
    names = [f"c{place}.xhtml" for place in range(len(chapters))]
    items = "".join(
        f'<item id="i{n}" href="{n}" media-type="application/xhtml+xml"/>' for n in names
    )
    spine = "".join(f'<itemref idref="i{n}"/>' for n in names)
    with zipfile.ZipFile(path, "w") as book:
        book.writestr("mimetype", "application/epub+zip")
        book.writestr(
            "META-INF/container.xml",
            '<?xml version="1.0"?><container version="1.0" '
            'xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles>'
            '<rootfile full-path="book.opf" media-type="application/oebps-package+xml"/>'
            "</rootfiles></container>",
        )
        book.writestr(
            "book.opf",
            '<?xml version="1.0"?><package xmlns="http://www.idpf.org/2007/opf" version="3.0">'
            '<metadata xmlns:dc="http://purl.org/dc/elements/1.1/">'
            f"<dc:title>{title}</dc:title></metadata>"
            f"<manifest>{items}</manifest><spine>{spine}</spine></package>",
        )
        for name, body in zip(names, chapters, strict=True):
            book.writestr(
                name,
                '<html xmlns="http://www.w3.org/1999/xhtml"><head><title>c</title></head>'
                f"<body>{body}</body></html>",
            )


def rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def good_pairs(request: dict[str, Any]) -> list[dict[str, Any]]:
    """Two pairs about the document in a request, with evidence that stands there."""
    document = request["messages"][-1]["content"]
    told = re.findall(r"[A-Z“][^.\n]{30,160}\.", document)
    return [
        {
            "question": f"What does the text tell at mark {len(quote)} of {document[-40:]!r}?",
            "answer": f"It tells this: {quote}",
            "evidence": [quote],
        }
        for quote in (told[1], told[-2])
    ]


def completion(content: str, *, finish: str = "stop", usage: bool = True) -> bytes:
    """The body of a chat completion."""
    body = {
        "id": "stub",
        "object": "chat.completion",
        "created": 0,
        "model": "stub",
        "choices": [
            {
                "index": 0,
                "finish_reason": finish,
                "message": {"role": "assistant", "content": content},
            }
        ],
    }
    if usage:
        body["usage"] = {"prompt_tokens": 1000, "completion_tokens": 100, "total_tokens": 1100}
    return json.dumps(body).encode()


Answer = Callable[[dict[str, Any], int], tuple[int, str, bytes]]
"""(request, its number from 0) → status, content type, body."""


def answer_well(request: dict[str, Any], number: int) -> tuple[int, str, bytes]:
    """Two good pairs for every request."""
    return 200, "application/json", completion(json.dumps({"pairs": good_pairs(request)}))


def error_answer(status: int, message: str) -> Answer:
    """The same error for every request, as OpenAI words it."""
    body = json.dumps({"error": {"message": message, "type": "stub"}}).encode()
    return lambda request, number: (status, "application/json", body)


class Stub:
    """A model's server on the loopback interface; use it in a `with` block.

    Attributes:
        url: for `--base-url`.
        requests: bodies of all requests so far; `keys`: their Authorization headers.
        delay: seconds before each answer.
    """

    def __init__(self, answer: Answer = answer_well, delay: float = 0.0) -> None:
        self.answer, self.delay = answer, delay
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.most_at_once = 0
        self._now = 0
        self._lock = threading.Lock()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                with stub._lock:
                    number = len(stub.requests)
                    stub.requests.append(json.loads(body))
                    stub.keys.append(self.headers.get("Authorization"))
                    stub._now += 1
                    stub.most_at_once = max(stub.most_at_once, stub._now)
                time.sleep(stub.delay)
                status, kind, answer = stub.answer(json.loads(body), number)
                with stub._lock:
                    stub._now -= 1
                try:
                    self.send_response(status)
                    self.send_header("Content-Type", kind)
                    self.send_header("Content-Length", str(len(answer)))
                    self.send_header("retry-after-ms", "5")
                    self.end_headers()
                    self.wfile.write(answer)
                except OSError:
                    pass  # the client was killed, as some tests want

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: object) -> None:
                pass

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def __enter__(self) -> Stub:
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


def save_tokenizer(folder: Path) -> Path:
    """A byte-level BPE tokenizer of 600 entries that knows the stories' words."""
    tiny.byte_tokenizer(*map(story, range(3)), size=600).save_pretrained(folder)
    return folder


def save_stories(folder: Path, count: int = 3) -> Path:
    """A folder of stories as text files."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(count):
        (folder / f"story{seed}.txt").write_text(story(seed), encoding="utf-8")
    return folder


def written(out: Path) -> dict[str, object]:
    """The rows of each file as bytes, and the steps of the record."""
    found: dict[str, object] = {
        path.name.removeprefix(out.stem): path.read_bytes()
        for path in (out, validation_path(out))
        if path.exists()
    }
    return {**found, "steps": sorted(steps(out))}


def steps(out: Path) -> list[tuple[str, str, str]]:
    with contextlib.closing(sqlite3.connect(provenance_path(out))) as database:
        return database.execute("SELECT kind, name, content FROM steps ORDER BY rowid").fetchall()

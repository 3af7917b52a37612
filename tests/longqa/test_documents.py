"""Readers: what every format gives, and what bad files say."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from longqa_material import epub, pdf, pdf_bomb, story

from longlora_plugin.longqa.documents import Limits, Unreadable, find_files
from longlora_plugin.longqa.reader import Reader
from longlora_plugin.longqa.sections import split_sections

pytest.importorskip("pypdf")
pytest.importorskip("markitdown")


@pytest.fixture(scope="module")
def reader():
    with Reader(Limits(max_file_mb=4, read_seconds=60)) as opened:
        yield opened


def read(reader: Reader, path: Path, content: bytes | str | None = None):
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return reader.read(path, path.name)


def test_plain_text_joins_hard_wrapped_lines_and_leaves_verse(reader, tmp_path):
    wrapped = "\n".join(["Prose that someone wrapped by hand at about seventy letters a line,"] * 3)
    verse = "A short line of verse\nAnd then another one"
    document = read(reader, tmp_path / "a.txt", f"{wrapped}\n\n{verse}\n")
    assert document.text.split("\n\n") == [wrapped.replace("\n", " "), verse]


def test_markdown_takes_sections_from_headings_but_not_from_code(reader, tmp_path):
    text = "# The Weir\n\nWater.\n\n## Gauges\n\n" + "Gauges hang low. " * 20
    text += "\n\n```\n# no heading\n```\n\n## Flow\n\n" + "Flow is even. " * 20
    document = read(reader, tmp_path / "a.md", text)
    first, second = split_sections(document)
    assert first.startswith("# The Weir\n\nWater.\n\n## Gauges")
    assert second.startswith("## Flow")


def test_html_gives_its_text_without_scripts_and_link_addresses(reader, tmp_path):
    page = (
        "<html><head><title>Tides</title><script>var hidden=1</script></head><body>"
        "<h1>Tides</h1><p>They <a href='http://x.example/y'>rise</a> at noon.</p></body></html>"
    )
    document = read(reader, tmp_path / "a.html", page)
    assert document.text == "# Tides\n\nThey rise at noon."


def test_epub_is_a_book_with_its_chapters_in_spine_order(reader, tmp_path):
    path = tmp_path / "a.epub"
    body = "<p>" + "The ferry left at dawn. " * 15 + "</p>"
    epub(path, "The Ferry", [f"<h1>Part {n}</h1>{body}" for n in ("One", "Two", "Three")])
    document = read(reader, path)
    assert document.kind == "book"
    headings = [re.findall(r"(?m)^#+ (.+)$", section) for section in split_sections(document)]
    assert headings == [["Part One"], ["Part Two"], ["Part Three"]]


def test_pdf_gives_paragraphs_and_sections_from_its_outline(reader, tmp_path):
    line = "The gauge at the northern weir was read every hour of the day and"
    pages = [[line, "of the night, exam-", "ined twice."], [line + " more."] * 6, [line] * 6]
    made = pdf(pages, outline=[("Method", 1), ("Results", 2)])
    document = read(reader, tmp_path / "a.pdf", made)
    assert "examined twice." in document.text
    method, results = split_sections(document)  # what is before Method is too short to be one
    assert method.count(" more.") == 6
    assert results == " ".join([line] * 6)


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("utf-8-sig", "Plain words with a mark in front of them, and nothing else at all."),
        ("utf-16", "Words in two bytes each, as some editors on Windows still save them."),
        ("cp1252", "Le café où l’on récite des poèmes était fermé; l’été s’achève déjà, hélas."),
        ("cp1250", "Zażółć gęślą jaźń, powiedział król; żółw śpi w łóżku, a święta są już blisko."),
        ("shift_jis", "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。" * 4),
    ],
)
def test_encodings_are_detected(reader, tmp_path, encoding, text):
    assert read(reader, tmp_path / "a.txt", text.encode(encoding)).text == text


def test_a_few_marks_late_in_a_long_file_are_read_as_windows_1252(reader, tmp_path):
    text = "Plain words, again and again.\n\n" * 9000 + "“We’ll see,” said Mr. Brontë."
    assert read(reader, tmp_path / "a.txt", text.encode("cp1252")).text == text


def test_a_given_encoding_is_used_for_text_that_is_not_utf8(tmp_path):
    with Reader(Limits(encoding="koi8-r")) as reader:
        assert read(reader, tmp_path / "a.txt", "Все семьи".encode("koi8-r")).text == "Все семьи"
        assert read(reader, tmp_path / "b.txt", "Все семьи").text == "Все семьи"
    with (
        Reader(Limits(encoding="ascii")) as reader,
        pytest.raises(Unreadable, match="neither UTF-8 nor ascii"),
    ):
        read(reader, tmp_path / "a.txt")


def test_a_digest_ignores_layout_but_not_words(reader, tmp_path):
    one = read(reader, tmp_path / "a.txt", "Some words.\n\nMore words.")
    two = read(reader, tmp_path / "b.txt", "Some   words.\r\n\r\n\r\nMore words.\n")
    other = read(reader, tmp_path / "c.txt", "Some words.\n\nOther words.")
    assert one.digest == two.digest != other.digest


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b" \n\t\n", "is empty"),
        ("a.txt", bytes(range(256)) * 40, "not be text|binary"),
        ("a.txt", b"MZ\x00\x01\x02\x03\x00\x00" * 50, "binary"),
        ("a.pdf", b"%PDF-1.7 and then nothing", "not a readable PDF"),
        ("a.pdf", pdf([[]]), "holds no text"),
        ("a.epub", b"PK\x03\x04 and then nothing", "not a readable EPUB"),
        ("a.docx", b"something", "not read"),
        ("a.json", b'{"a": 1}', "not read"),
        ("a.py", b"print(1)", "not read"),
    ],
)
def test_a_bad_file_says_why(reader, tmp_path, name, content, says):
    with pytest.raises(Unreadable, match=says):
        read(reader, tmp_path / name, content)


def test_an_encrypted_pdf_says_so(reader, tmp_path):
    from pypdf import PdfWriter

    (tmp_path / "open.pdf").write_bytes(pdf([["Some words."]]))
    writer = PdfWriter(clone_from=tmp_path / "open.pdf")
    writer.encrypt("secret", algorithm="RC4-128")
    writer.write(tmp_path / "a.pdf")
    with pytest.raises(Unreadable, match="encrypted; save a copy"):
        read(reader, tmp_path / "a.pdf")


def test_a_pdf_bomb_is_refused(reader, tmp_path):
    bomb = pdf_bomb(120)
    assert len(bomb) < 1_000_000
    with pytest.raises(Unreadable, match=r"bomb|limit"):
        read(reader, tmp_path / "a.pdf", bomb)


def test_an_epub_that_unpacks_to_too_much_is_refused(reader, tmp_path):
    import zipfile

    path = tmp_path / "a.epub"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as book:
        book.writestr("mimetype", "application/epub+zip", zipfile.ZIP_STORED)
        book.writestr("c.xhtml", b" " * 40_000_000)
    with pytest.raises(Unreadable, match="unpacks to 40 MB"):
        read(reader, path)


def test_a_file_of_one_gigabyte_is_refused_unread(reader, tmp_path):
    path = tmp_path / "a.txt"
    with path.open("wb") as stream:
        stream.truncate(1 << 30)
    with pytest.raises(
        Unreadable, match=r"1,073.7 MB, above the limit of 4 MB.*--max-file-mb 1074"
    ):
        read(reader, path)


def wait_for_the_end_of(worker: int) -> None:
    deadline = time.monotonic() + 10
    while Path(f"/proc/{worker}/stat").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


HOSTILE = {
    "backticks.md": " ".join("`" * n for n in range(1, 6000)),
    "nested.md": "> " * 200_000 + "a",
    "nested.html": "<div>" * 400_000 + "deep",
    "table.html": "<table><tr><td>" * 100_000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_file_that_keeps_any_parser_busy_is_given_up_in_time(tmp_path, name):
    with Reader(Limits(read_seconds=3)) as reader:
        read(reader, tmp_path / "before.txt", "Some words.")
        start = time.monotonic()
        with contextlib.suppress(Unreadable):
            read(reader, tmp_path / name, HOSTILE[name])
        assert time.monotonic() - start < 6
        assert read(reader, tmp_path / "after.txt", "Some words.").text == "Some words."


@pytest.mark.parametrize("suffix", ["txt", "md", "html", "pdf"])
def test_the_time_limit_ends_the_worker_whatever_the_format(tmp_path, monkeypatch, suffix):
    made = pdf([["Words on a page."]]) if suffix == "pdf" else "Words on a page."
    with Reader(Limits(read_seconds=1e-6)) as reader:
        with pytest.raises(Unreadable, match="took longer than 1e-06 s"):
            read(reader, tmp_path / f"a.{suffix}", made)
        wait_for_the_end_of(reader._worker)
        reader.limits = Limits()
        assert read(reader, tmp_path / f"b.{suffix}", made).text == "Words on a page."


def test_a_worker_that_dies_costs_one_file(tmp_path):
    with Reader() as reader:
        read(reader, tmp_path / "a.txt", "Words.")
        os.kill(reader._worker, signal.SIGKILL)
        with pytest.raises(Unreadable, match="crashed its parser"):
            read(reader, tmp_path / "a.txt")
        assert read(reader, tmp_path / "a.txt").text == "Words."


def test_the_worker_ends_with_a_parent_that_is_killed(tmp_path):
    (tmp_path / "a.txt").write_text("Words.")
    program = (
        "import os, sys; from pathlib import Path\n"
        "from longlora_plugin.longqa.reader import Reader\n"
        "reader = Reader(); reader.read(Path(sys.argv[1]), 'a')\n"
        "print(reader._worker, flush=True); os.kill(os.getpid(), 9)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "a.txt"], capture_output=True, text=True
    )
    wait_for_the_end_of(int(ran.stdout))


def test_links_are_read_only_where_they_stay_in_the_folder(reader, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret.txt").write_text("A secret.")
    (source / "a.txt").write_text("Some words.")
    (source / "inside.txt").symlink_to("a.txt")
    (source / "out.txt").symlink_to("../outside/secret.txt")
    (source / "folder").symlink_to("../outside")
    (source / "again").symlink_to(".")
    (source / "self.txt").symlink_to("self.txt")
    (source / "none.txt").symlink_to("nowhere.txt")
    found = {}
    for path in find_files(source):
        try:
            found[path.name] = reader.read(path, path.name, source).text
        except Unreadable as error:
            found[path.name] = str(error)
    assert found.pop("a.txt") == found.pop("inside.txt") == "Some words."
    assert "link out of the folder" in found.pop("out.txt")
    assert "link out of the folder" in found.pop("folder")
    assert "only linked" in found.pop("again")
    assert found == dict.fromkeys(("self.txt", "none.txt"), "is not a regular file")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may list every folder")
def test_a_folder_that_cannot_be_listed_is_named(reader, tmp_path):
    (tmp_path / "closed").mkdir(mode=0)
    with pytest.raises(Unreadable, match="cannot be listed"):
        reader.read(find_files(tmp_path)[0], "closed", tmp_path)


def test_a_device_is_not_read(reader):
    with pytest.raises(Unreadable, match="not a regular file"):
        reader.read(Path("/dev/zero"), "zero")


def test_a_pipe_is_not_waited_for(reader, tmp_path):
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(Unreadable, match="not a regular file"):
        reader.read(tmp_path / "a.txt", "a.txt")


def test_files_come_in_a_fixed_order_without_hidden_ones(tmp_path):
    for name in ("b/two.txt", "a.txt", ".git/config.txt", "b/.hidden.txt", "b/one.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    found = [path.relative_to(tmp_path).as_posix() for path in find_files(tmp_path)]
    assert found == ["a.txt", "b/one.txt", "b/two.txt"]


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (story(1), "book"),
        ("A Study of Weirs\n\nAbstract\n\nWe look.\n\nReferences\n\n[1] X.", "paper"),
        ("Minutes of the meeting.\n\nThe budget was agreed.", "report"),
    ],
)
def test_the_kind_is_judged_by_what_stands_in_the_text(reader, tmp_path, text, kind):
    assert read(reader, tmp_path / "a.txt", text).kind == kind

"""`longqa build` without a model: what it writes, and that any interruption is made good."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import resource
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from longqa_material import epub, pdf, rows, save_stories, save_tokenizer, story

from longlora_plugin.cli import longlora
from longlora_plugin.longqa import journal
from longlora_plugin.longqa.journal import provenance_path, validation_path
from longlora_plugin.longqa.short import read_short
from longlora_plugin.longqa.wordings import FRAMES, as_trained

for package in ("sentencex", "datasketch", "pypdf", "markitdown"):
    pytest.importorskip(package)

CONTEXT = 1200


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    return save_stories(tmp_path_factory.mktemp("stories"))


@pytest.fixture
def build(tokenizer, monkeypatch):
    """Function (source, out, *options) → click's result; options may repeat the defaults."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(source: Path, out: Path, *options: str, context: int = CONTEXT):
        arguments = ["longqa", "build", str(source), str(out), "--tokenizer", str(tokenizer)]
        arguments += ["--context", str(context), *(str(option) for option in options)]
        return CliRunner().invoke(longlora, arguments)

    return run


def written(out: Path) -> dict[str, bytes]:
    paths = (out, validation_path(out), provenance_path(out))
    return {path.name.removeprefix(out.stem): path.read_bytes() for path in paths if path.exists()}


def test_the_same_seed_gives_identical_files_and_another_seed_does_not(build, stories, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        result = build(
            stories, tmp_path / f"{name}.jsonl", "--seed", seed, "--validation-share", 0.3
        )
        assert result.exit_code == 0, result.output
    a, b, c = (written(tmp_path / f"{name}.jsonl") for name in "abc")
    assert a == b
    assert a[".jsonl"] != c[".jsonl"]


def test_rows_have_the_two_keys_of_longalpaca_and_hold_document_question_and_answer(
    build, stories, tmp_path
):
    out = tmp_path / "a.jsonl"
    assert build(stories, out).exit_code == 0
    entries = [json.loads(line) for line in provenance_path(out).read_bytes().splitlines()]
    pairs = {pair["row"]: pair for entry in entries if "pairs" in entry for pair in entry["pairs"]}
    for line in out.read_bytes().splitlines():
        row, pair = json.loads(line), pairs[journal.row_name(line)]
        assert list(row) == ["instruction", "output"]
        assert row["output"] == pair["answer"]
        assert pair["question"] in row["instruction"]
        assert all(quote in row["instruction"] for quote in pair["evidence"])
    assert {pair["task"] for pair in pairs.values()} == {
        "who_said", "what_follows", "fill_name", "find_needle", "order_of_events", "multi_hop",
    }  # fmt: skip


@pytest.mark.parametrize(("layout", "context"), [("alpaca", 700), ("alpaca", 1500), ("chat", 900)])
def test_no_row_is_longer_than_the_context_as_it_is_trained(
    build, stories, tmp_path, tokenizer, layout, context
):
    from transformers import AutoTokenizer

    out = tmp_path / "a.jsonl"
    assert build(stories, out, "--layout", layout, context=context).exit_code == 0
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    sizes = []
    for row in rows(out):
        if layout == "chat":
            assert [turn["role"] for turn in row["messages"]] == ["user", "assistant"]
            text = [turn["content"] for turn in row["messages"]]
        else:
            text = [row["instruction"], row["output"]]
        sizes.append(len(loaded(as_trained(layout, *text, loaded))["input_ids"]) + 2)
    assert max(sizes) <= context
    assert max(sizes) > 0.6 * context


def test_a_folder_of_mixed_documents_is_read_and_what_is_bad_is_reported(build, tmp_path):
    source = tmp_path / "mixed"
    source.mkdir()
    (source / "a.txt").write_text(story(1))
    (source / "b.md").write_text("# Notes\n\n" + story(2).replace("CHAPTER", "## CHAPTER"))
    page = "".join(f"<p>{part}</p>" for part in story(3).split("\n\n"))
    (source / "c.html").write_text(f"<html><body>{page}</body></html>")
    epub(source / "d.epub", "D", [f"<h1>One</h1><p>{part}</p>" for part in story(4).split("\n\n")])
    lines = [line.replace("“", '"').replace("”", '"') for line in story(5).split("\n\n")]
    (source / "e.pdf").write_bytes(pdf([lines[:10], lines[10:]]))
    (source / "f.py").write_bytes(Path(json.__file__).read_bytes())
    (source / "empty.txt").write_text("")
    (source / "broken.pdf").write_bytes(b"%PDF-1.4 nothing")
    out, report = tmp_path / "out" / "a.jsonl", tmp_path / "report.json"
    result = build(source, out, "--json", report)
    assert result.exit_code == 0, result.output
    found = json.loads(report.read_text())
    assert found["documents"] == 6
    assert set(found["skipped"]) == {"empty.txt", "broken.pdf"}
    assert "skipped empty.txt: is empty" in result.output
    entries = [json.loads(line) for line in provenance_path(out).read_bytes().splitlines()]
    built = {entry["name"] for entry in entries if entry.get("pairs")}
    assert built == {"a.txt", "b.md", "c.html", "d.epub", "e.pdf", "f.py"}
    kinds = {entry["name"]: entry["kind"] for entry in entries if entry["type"] == "document"}
    assert (kinds["a.txt"], kinds["d.epub"], kinds["f.py"]) == ("book", "book", "code")
    assert build(source, out, "--strict").exit_code == 3


def test_a_build_without_any_pair_exits_with_1(build, tmp_path):
    (tmp_path / "a.txt").write_text("")
    result = build(tmp_path / "a.txt", tmp_path / "out.jsonl")
    assert result.exit_code == 1
    assert "No pairs" in result.output


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--context", "120"], "leaves 0 tokens for the document"),
        (["--task", "who_sayd"], "unknown task 'who_sayd'; valid: who_said"),
        (["--base-url", "http://localhost:1/v1"], "--base-url and --model go together"),
        (["--max-tokens", "5"], "--max-tokens is about a model"),
        (["--short-share", "0.5"], "needs --short FILE"),
        (["--tokenizer", "/nowhere"], "--tokenizer /nowhere: no tokenizer there"),
        (["--validation-share", "1"], "validation-share"),
    ],
)
def test_wrong_options_exit_with_2_and_say_what_to_write(build, stories, tmp_path, options, says):
    result = build(stories, tmp_path / "a.jsonl", *options)
    assert result.exit_code == 2
    assert says in " ".join(result.output.split())
    assert not (tmp_path / "a.jsonl").exists()


def test_a_build_with_other_settings_does_not_mix_with_the_first(build, stories, tmp_path):
    out = tmp_path / "a.jsonl"
    build(stories, out, "--seed", 1)
    before = written(out)
    result = build(stories, out, "--seed", 2)
    assert result.exit_code == 2
    assert "seed: it has 1, now 2" in " ".join(result.output.split())
    assert written(out) == before


def test_a_file_that_is_not_ours_is_left_alone(build, stories, tmp_path):
    out = tmp_path / "mine.jsonl"
    out.write_text('{"instruction": "mine"}\n')
    result = build(stories, out)
    assert result.exit_code == 2
    assert "was not made by this command" in " ".join(result.output.split())
    assert out.read_text() == '{"instruction": "mine"}\n'


def test_no_document_is_in_both_training_and_validation(build, tmp_path):
    source = save_stories(tmp_path / "many", 12)
    out = tmp_path / "a.jsonl"
    assert build(source, out, "--validation-share", 0.4, "--questions", 2).exit_code == 0
    sides = {}
    for path in (out, validation_path(out)):
        text = path.read_text()
        sides[path.name] = {seed for seed in range(12) if f"number {seed}\\n" in text}
    train, validation = sides.values()
    assert train | validation == set(range(12))
    assert not train & validation
    assert 2 <= len(validation) <= 8


def test_the_same_text_in_two_files_counts_once(build, tmp_path):
    source = save_stories(tmp_path / "docs", 2)
    (source / "copy.md").write_text(story(0).replace("\n\n", "\n\n\n"))
    (source / "edition.txt").write_text(story(1).replace("In the year", "In that year", 2))
    out, report = tmp_path / "a.jsonl", tmp_path / "r.json"
    assert build(source, out, "--validation-share", 0.5, "--json", report).exit_code == 0
    found = json.loads(report.read_text())
    assert found["documents"] == 2
    assert found["duplicates"] == {"story0.txt": "copy.md", "story1.txt": "edition.txt"}


def test_new_documents_are_added_and_what_was_there_stays(build, tmp_path):
    source = save_stories(tmp_path / "docs", 2)
    out = tmp_path / "a.jsonl"
    build(source, out)
    before = out.read_bytes()
    (source / "a_first_by_name.txt").write_text(story(7))
    (source / "copy_of_old.txt").write_text(story(0))
    result = build(source, out)
    assert "copy_of_old.txt: nearly the same as story0.txt" in result.output
    after = out.read_bytes()
    assert after.startswith(before)
    assert len(after) > len(before)


def test_a_finished_build_given_again_changes_nothing(build, stories, tmp_path):
    out = tmp_path / "a.jsonl"
    build(stories, out, "--validation-share", 0.3)
    before = written(out)
    assert build(stories, out, "--validation-share", 0.3).exit_code == 0
    assert written(out) == before


def test_a_build_cut_at_any_byte_ends_as_if_uninterrupted(build, stories, tmp_path):
    short = tmp_path / "short.jsonl"
    short.write_text(
        "".join(f'{{"instruction": "Say {n}.", "output": "{n}"}}\n' for n in range(99))
    )
    options = ("--validation-share", 0.4, "--short", short, "--questions", 3)
    whole = tmp_path / "whole.jsonl"
    assert build(stories, whole, *options).exit_code == 0
    wanted = written(whole)
    rng = random.Random(0)
    for trial in range(6):
        # A kill leaves a prefix of the record, and of the rows no more than the record tells of.
        record = wanted[".provenance.jsonl"]
        record = record[: rng.randrange(record.index(b"\n") + 1, len(record))]
        told = record[: record.rfind(b"\n") + 1].decode()
        out = tmp_path / f"cut{trial}.jsonl"
        provenance_path(out).write_bytes(record)
        for name, path in ((".jsonl", out), (".validation.jsonl", validation_path(out))):
            lines = wanted[name].splitlines(keepends=True)
            known = [line for line in lines if journal.row_name(line) in told]
            rest = b"".join(lines[: rng.randint(0, len(known))])
            half = lines[len(rest.splitlines()) :][:1]
            path.write_bytes(rest + (half[0][: rng.randrange(len(half[0]))] if half else b""))
        assert build(stories, out, *options).exit_code == 0
        assert written(out) == wanted


def test_a_half_written_line_at_the_end_is_repaired(build, stories, tmp_path):
    out = tmp_path / "a.jsonl"
    build(stories, out)
    before = written(out)
    for path in (out, provenance_path(out)):
        path.write_bytes(path.read_bytes() + b'{"instruction": "Here is')
    assert build(stories, out).exit_code == 0
    assert written(out) == before


def test_a_damaged_record_is_refused_with_its_line(build, stories, tmp_path):
    out = tmp_path / "a.jsonl"
    build(stories, out)
    lines = provenance_path(out).read_bytes().splitlines(keepends=True)
    lines[2] = b"{broken\n"
    provenance_path(out).write_bytes(b"".join(lines))
    result = build(stories, out)
    assert result.exit_code == 2
    assert "line 3 is damaged" in " ".join(result.output.split())


@pytest.mark.parametrize("room", [0, 1, 7, 12])
def test_a_full_disk_keeps_what_is_finished_and_the_next_run_goes_on(
    build, stories, tmp_path, monkeypatch, room
):
    whole = tmp_path / "whole.jsonl"
    build(stories, whole)

    class Full:
        def __init__(self, stream):
            self.stream = stream

        def write(self, data):
            self.stream.write(bytes(data[: len(data) // 2]))
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def __getattr__(self, name):
            return getattr(self.stream, name)

    append, left = journal.Growing.append, [room]

    def append_to_full_disk(self, line):
        if left[0] == 0 and not isinstance(self._stream, Full):
            self._stream = Full(self._stream)
        left[0] = max(0, left[0] - 1)
        append(self, line)

    out = tmp_path / "a.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(journal.Growing, "append", append_to_full_disk)
        result = build(stories, out)
    assert result.exit_code == 6
    assert "No space left on device" in result.output
    assert "give the same command again" in " ".join(result.output.split())
    kept = out.read_bytes() if out.exists() else b""
    assert whole.read_bytes().startswith(kept)
    assert kept.endswith(b"\n") or not kept
    assert build(stories, out).exit_code == 0
    assert written(out) == written(whole)


def test_a_real_write_error_keeps_whole_lines_and_exits_with_6(build, stories, tmp_path):
    out, said = tmp_path / "a.jsonl", tmp_path / "said.txt"
    limit = 60_000

    def build_with_little_room():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        result = build(stories, out)
        said.write_text(result.output)
        sys.exit(result.exit_code)

    child = multiprocessing.get_context("fork").Process(target=build_with_little_room)
    child.start()
    child.join(60)
    assert child.exitcode == 6
    assert "cannot be written: File too large" in said.read_text()
    assert 0 < out.stat().st_size <= limit
    assert all(set(row) == {"instruction", "output"} for row in rows(out))


def test_two_builds_of_one_file_at_a_time_are_refused(build, stories, tmp_path):
    from filelock import FileLock

    out = tmp_path / "a.jsonl"
    with FileLock(f"{provenance_path(out)}.lock"):
        result = build(stories, out)
    assert result.exit_code == 2
    assert "another build is writing" in " ".join(result.output.split())


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_short_instructions_get_their_share_all_along_the_file(build, stories, tmp_path, share):
    short = tmp_path / "short.json"
    short.write_text(
        json.dumps(
            [{"instruction": f"Say {n}.", "input": "", "output": str(n)} for n in range(500)]
        )
    )
    out = tmp_path / "a.jsonl"
    result = build(stories, out, "--short", short, "--short-share", share)
    assert result.exit_code == 0
    found = [len(row["instruction"]) < 20 for row in rows(out)]
    assert all(set(row) == {"instruction", "output"} for row in rows(out))
    for end in (len(found) // 2, len(found)):
        assert sum(found[:end]) / end == pytest.approx(share, abs=0.03)
    assert len(
        {row["instruction"] for row in rows(out)} & {f"Say {n}." for n in range(500)}
    ) == sum(found)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "holds no rows"),
        ("not json\n", "is not JSON"),
        ('{"question": "a"}\n', r"row 1 has the keys \['question'\]"),
        ("[1]", "row 1 is 1"),
    ],
)
def test_a_wrong_file_of_short_instructions_says_where(tmp_path, content, says):
    path = tmp_path / "short.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=says):
        read_short(path)


@pytest.mark.parametrize(
    ("package", "options"),
    [
        ("sentencex", []),
        ("datasketch", []),
        ("rapidfuzz", ["--evidence-edits", "2"]),
        ("openai", ["--base-url", "http://localhost:1/v1", "--model", "m"]),
    ],
)
def test_a_missing_package_is_named_with_the_line_that_installs_it(
    build, stories, tmp_path, monkeypatch, package, options
):
    monkeypatch.setitem(sys.modules, package, None)
    result = build(stories, tmp_path / "a.jsonl", *options)
    assert result.exit_code == 2
    said = " ".join(result.output.split())
    assert f"needs {package}; pip install 'longlora-plugin[longqa]'" in said


def test_dry_run_counts_windows_and_writes_nothing(build, stories, tmp_path):
    result = build(stories, tmp_path / "new" / "a.jsonl", "--dry-run")
    assert result.exit_code == 0
    assert "windows to build" in result.output
    assert not (tmp_path / "new").exists()


def test_only_the_chosen_tasks_are_used(build, stories, tmp_path):
    report = tmp_path / "r.json"
    build(stories, tmp_path / "a.jsonl", "--task", "find_needle", "--json", report)
    assert set(json.loads(report.read_text())["tasks"]) == {"find_needle"}


def test_every_kind_has_several_wordings_with_one_place_for_document_and_question():
    assert set(FRAMES) == {"paper", "book", "report", "code"}
    every = [frame for frames in FRAMES.values() for frame in frames]
    assert all(len(frames) >= 3 for frames in FRAMES.values())
    assert len(set(every)) == len(every)
    for frame in every:
        assert frame.count("{document}") == frame.count("{question}") == 1
        assert frame.index("{document}") < frame.index("{question}")


def test_a_document_with_braces_is_written_as_it_is(build, tmp_path):
    (tmp_path / "a.txt").write_text(story(1).replace("CHAPTER 1", "CHAPTER 1 {question} {0}"))
    assert build(tmp_path / "a.txt", tmp_path / "out.jsonl").exit_code == 0
    assert any(
        "CHAPTER 1 {question} {0}" in row["instruction"] for row in rows(tmp_path / "out.jsonl")
    )

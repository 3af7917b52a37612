"""Any interruption of `longqa build` is made good by giving the command again."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import multiprocessing
import os
import random
import resource
import sqlite3
import sys
from pathlib import Path

import pytest
from longqa_material import rows, save_stories, steps, story, written

from longlora_plugin.longqa import journal
from longlora_plugin.longqa.journal import provenance_path, validation_path

for package in ("sentencex", "datasketch"):
    pytest.importorskip(package)


def test_a_build_cut_anywhere_ends_as_if_uninterrupted(build, stories, tmp_path):
    short = tmp_path / "short.jsonl"
    short.write_text(
        "".join(f'{{"instruction": "Say {n}.", "output": "{n}"}}\n' for n in range(99))
    )
    options = ("--validation-share", 0.4, "--short", short, "--questions", 3)
    whole = tmp_path / "whole.jsonl"
    assert build(stories, whole, *options).exit_code == 0
    wanted, every = written(whole), steps(whole)
    rng = random.Random(0)
    for trial in range(6):
        # A kill leaves the first steps of the record, and rows only of those steps.
        kept = every[: rng.randrange(1, len(every))]
        out = tmp_path / f"cut{trial}.jsonl"
        with journal.Journal(out, write=True) as record:
            for kind, name, content in kept:
                record.write(kind, name, json.loads(content))
        told = str(kept)
        for name, path in ((".jsonl", out), (".validation.jsonl", validation_path(out))):
            lines = wanted[name].splitlines(keepends=True)
            known = [line for line in lines if journal.row_name(line) in told]
            rest = b"".join(lines[: rng.randint(0, len(known))])
            half = lines[len(rest.splitlines()) :][:1]
            path.write_bytes(rest + (half[0][: rng.randrange(len(half[0]))] if half else b""))
        assert build(stories, out, *options).exit_code == 0
        assert written(out) == wanted


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


def test_a_half_written_line_at_the_end_is_repaired(build, stories, tmp_path):
    out = tmp_path / "a.jsonl"
    build(stories, out)
    before = written(out)
    out.write_bytes(out.read_bytes() + b'{"instruction": "Here is')
    assert build(stories, out).exit_code == 0
    assert written(out) == before


@pytest.mark.parametrize("damage", ["not a database", "a page", "a step"])
def test_a_damaged_record_is_refused_and_nothing_is_changed(build, stories, tmp_path, damage):
    out = tmp_path / "a.jsonl"
    build(stories, out)
    record = provenance_path(out)
    if damage == "not a database":
        record.write_bytes(b"something else" * 100)
    elif damage == "a page":
        content = bytearray(record.read_bytes())
        content[100:3000] = bytes(2900)
        record.write_bytes(content)
    else:
        with contextlib.closing(sqlite3.connect(record)) as database, database:
            database.execute("UPDATE steps SET content = '{broken' WHERE rowid = 3")
    before = out.read_bytes(), record.read_bytes()
    result = build(stories, out)
    assert result.exit_code == 2
    assert "provenance.sqlite is damaged" in " ".join(result.output.split())
    assert (out.read_bytes(), record.read_bytes()) == before


@pytest.mark.parametrize("room", [0, 1, 7, 12])
def test_a_full_disk_keeps_what_is_finished_and_the_next_run_goes_on(
    build, stories, tmp_path, monkeypatch, room
):
    whole = tmp_path / "whole.jsonl"
    build(stories, whole)

    append, left = journal.Rows.append, [room]

    def append_to_full_disk(self, line):
        left[0] -= 1
        if left[0] >= 0:
            return append(self, line)
        with monkeypatch.context() as patch:
            patch.setattr(Path, "open", open_on_full_disk)
            return append(self, line)

    class Full(io.FileIO):
        def write(self, data):
            super().write(bytes(data[: len(data) // 2]))
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def open_on_full_disk(path, mode):
        return Full(path, mode)

    out = tmp_path / "a.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(journal.Rows, "append", append_to_full_disk)
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
    assert "cannot be written: " in said.read_text()
    assert 0 < out.stat().st_size <= limit
    assert all(set(row) == {"instruction", "output"} for row in rows(out))


def test_two_builds_of_one_file_at_a_time_are_refused(build, stories, tmp_path):
    from filelock import FileLock

    out = tmp_path / "a.jsonl"
    with FileLock(f"{provenance_path(out)}.lock"):
        result = build(stories, out)
    assert result.exit_code == 2
    assert "another build is writing" in " ".join(result.output.split())

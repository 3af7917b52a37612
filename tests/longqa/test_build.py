"""`longqa build` without a model: what it writes, and that any interruption is made good."""

from __future__ import annotations

import json
import sys

import pytest
from longqa_material import epub, pdf, rows, save_stories, steps, story, written

from longlora_plugin.longqa import journal
from longlora_plugin.longqa.journal import validation_path
from longlora_plugin.longqa.wordings import FRAMES, as_trained

for package in ("sentencex", "datasketch", "pypdf", "markitdown"):
    pytest.importorskip(package)

CONTEXT = 1200


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
    entries = [json.loads(content) for kind, _, content in steps(out) if kind == "unit"]
    pairs = {pair["row"]: pair for entry in entries for pair in entry["pairs"]}
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
    (source / "empty.txt").write_text("")
    (source / "broken.pdf").write_bytes(b"%PDF-1.4 nothing")
    out, report = tmp_path / "out" / "a.jsonl", tmp_path / "report.json"
    result = build(source, out, "--json", report)
    assert result.exit_code == 0, result.output
    found = json.loads(report.read_text())
    assert found["documents"] == 5
    assert set(found["skipped"]) == {"empty.txt", "broken.pdf"}
    assert "skipped empty.txt: is empty" in result.output
    entries = [(kind, json.loads(content)) for kind, _, content in steps(out)]
    built = {entry["name"] for kind, entry in entries if kind == "unit" and entry["pairs"]}
    assert built == {"a.txt", "b.md", "c.html", "d.epub", "e.pdf"}
    kinds = {entry["name"]: entry["kind"] for kind, entry in entries if kind == "unit"}
    assert (kinds["a.txt"], kinds["d.epub"]) == ("book", "book")
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
        (["--task", "who_sayd"], "'who_sayd' is not one of 'who_said'"),
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
    assert set(FRAMES) == {"paper", "book", "report"}
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

"""`longqa stats`: figures, warnings, picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from json_keys import assert_documented
from longqa_material import rows, save_stories, save_tokenizer

from longlora_plugin.cli import longlora
from longlora_plugin.longqa.stats import Described, describe, summarize
from longlora_plugin.longqa.wordings import as_trained

for package in ("sentencex", "datasketch"):
    pytest.importorskip(package)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path]:
    """A built file with short rows, and the tokenizer."""
    folder = tmp_path_factory.mktemp("built")
    tokenizer = save_tokenizer(folder / "tokenizer")
    short = folder / "short.jsonl"
    short.write_text(
        "".join(f'{{"instruction": "Say {n}.", "output": "{n}"}}\n' for n in range(99))
    )
    arguments = ["longqa", "build", save_stories(folder / "docs"), folder / "a.jsonl"]
    arguments += ["--tokenizer", tokenizer, "--context", 1500, "--short", short]
    result = CliRunner().invoke(longlora, [str(part) for part in arguments])
    assert result.exit_code == 0, result.output
    return folder / "a.jsonl", tokenizer


def stats(*arguments: object, code: int = 0):
    result = CliRunner().invoke(longlora, ["longqa", "stats", *(str(part) for part in arguments)])
    assert result.exit_code == code, result.output
    return result.output


def row(**changes) -> Described:
    facts = {"file": "f", "name": "n", "kind": "book", "task": "t", "document": "d"}
    return Described(**{**facts, "tokens": 100, "characters": 400, "depth": 0.5, **changes})


def many(count: int, **changes) -> list[Described]:
    return [
        row(name=f"n{n}{changes}", **{"document": f"d{n % 5}", **changes}) for n in range(count)
    ]


def test_figures_of_a_built_file_agree_with_counting_by_hand(built, tmp_path):
    from transformers import AutoTokenizer

    out, tokenizer = built
    stats(out, "--json", tmp_path / "s.json")
    found = json.loads((tmp_path / "s.json").read_text())
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    sizes = sorted(
        len(loaded(as_trained("alpaca", row["instruction"], row["output"]))["input_ids"]) + 2
        for row in rows(out)
    )
    assert found["pairs"] == len(sizes)
    assert (found["lengths"]["min"], found["lengths"]["max"]) == (sizes[0], sizes[-1])
    assert found["lengths"]["total"] == sum(sizes)
    assert found["above"]["1024"] == sum(size > 1024 for size in sizes) / len(sizes)
    assert set(found["kinds"]) == {"book", "short"}
    assert sum(found["kinds"].values()) == sum(found["tasks"].values()) == len(sizes)
    assert found["documents"] == 3
    assert found["by_file"][0]["pairs"] == len(sizes)


def test_a_tokenizer_measures_the_same_as_the_record_says(built):
    from transformers import AutoTokenizer

    out, tokenizer = built
    recorded, _ = describe(out)
    measured, _ = describe(out, AutoTokenizer.from_pretrained(tokenizer))
    assert [row.tokens for row in recorded] == [row.tokens for row in measured]


def test_a_file_without_a_record_is_described_as_far_as_it_can_be(built, tmp_path):
    copy = tmp_path / "longalpaca.json.jsonl"
    copy.write_bytes(built[0].read_bytes())
    described, damaged = describe(copy)
    assert damaged == {}
    summary = summarize(described, sequence_len=100)
    assert (summary.unit, set(summary.kinds)) == ("characters", {"unknown"})
    assert summary.above == {}
    assert any("add --tokenizer" in warning for warning in summary.warnings)


def test_several_files_are_described_together_and_each(built, tmp_path):
    other = tmp_path / "chat.jsonl"
    turns = [{"role": "user", "content": "Long? " * 9}, {"role": "assistant", "content": "Yes."}]
    other.write_text(json.dumps({"messages": turns}) + "\n")
    stats(built[0], other, "--tokenizer", built[1], "--json", tmp_path / "s.json")
    found = json.loads((tmp_path / "s.json").read_text())
    assert [one["pairs"] for one in found["by_file"]] == [len(rows(built[0])), 1]
    assert_documented("longqa stats", found)
    assert found["pairs"] == len(rows(built[0])) + 1


def test_lines_that_are_no_rows_are_named_and_not_fatal(tmp_path):
    path = tmp_path / "a.jsonl"
    good = '{"instruction": "a b c", "output": "c"}\n'
    path.write_text(good + '{"instruction": "cut' + "\n" + good + '{"text": "x"}\n')
    output = " ".join(stats(path, "--json", tmp_path / "s.json").split())
    found = json.loads((tmp_path / "s.json").read_text())
    assert found["pairs"] == 2
    assert [where.rsplit(" ", 1)[1] for where in found["damaged"]] == ["2", "4"]
    assert "2 lines are no rows" in output


def test_json_nested_too_deep_is_damage_of_its_line_or_of_the_one_list(tmp_path):
    deep = "[" * 200_000 + "]" * 200_000
    lines, whole = tmp_path / "lines.jsonl", tmp_path / "whole.json"
    lines.write_text(f'{{"instruction": "a", "output": "b"}}\n{{"instruction": {deep}}}\n')
    whole.write_text(deep)
    described, damaged = describe(lines)
    assert len(described) == 1
    assert [where.rsplit(" ", 1)[1] for where in damaged] == ["2"]
    result = CliRunner().invoke(longlora, ["longqa", "stats", str(whole)])
    assert (result.exit_code, "is not JSON" in result.output) == (1, True), result.output


def test_one_json_list_is_read_as_longalpaca_has_it(tmp_path):
    path = tmp_path / "LongAlpaca-12k.json"
    listed = [{"instruction": f"a {n}", "input": "", "output": "c"} for n in range(3)]
    path.write_text(json.dumps([*listed, 5], indent=2))
    described, damaged = describe(path)
    assert len(described) == 3
    assert list(damaged.values()) == ["is 5, not an object"]
    path.write_text("[{")
    with pytest.raises(ValueError, match="begins a JSON list, but is not JSON"):
        describe(path)


def test_warns_of_pairs_that_the_recipe_would_drop():
    summary = summarize([*many(8), *many(2, tokens=900)], sequence_len=512)
    assert any("2 of 10 pairs are longer than sequence_len: 512" in w for w in summary.warnings)
    assert any("raise it to 900" in warning for warning in summary.warnings)
    assert summarize([*many(8), *many(2, tokens=900)], sequence_len=900).warnings == []


def test_warns_of_answers_that_stand_at_the_beginning_only():
    early = summarize([*many(8, depth=0.05), *many(4, depth=0.6)])
    assert any("8 of 12 answers are in the first 10%" in warning for warning in early.warnings)
    assert summarize([*many(6, depth=0.05), *many(6, depth=0.6)]).warnings == []
    assert early.depths == [8, 0, 0, 0, 0, 0, 4, 0, 0, 0]


def test_warns_of_one_document_that_dominates():
    summary = summarize([*many(11, document="big"), *many(10)])
    assert any("big has 11 of 21 pairs" in warning for warning in summary.warnings)
    assert summarize([*many(10, document="big"), *many(10)]).warnings == []
    alone = summarize(many(3, document="only"))
    assert any("all pairs are about one document" in warning for warning in alone.warnings)


def test_warns_of_rows_that_stand_there_twice():
    assert any(
        "1 rows are there more than once" in w for w in summarize([*many(9), *many(1)]).warnings
    )


def test_the_picture_is_a_png(built, tmp_path):
    stats(built[0], "--plot", tmp_path / "s.png", "--sequence-len", 1400)
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_a_missing_file_is_an_error_and_an_empty_one_a_warning(tmp_path):
    assert "cannot be read" in stats(tmp_path / "none.jsonl", code=1)
    (tmp_path / "empty.jsonl").write_text("")
    assert "there are no pairs" in stats(tmp_path / "empty.jsonl")

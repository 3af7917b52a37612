"""Data that cannot extend a context is said so: by plain lengths, by `check`, and by a run."""

from __future__ import annotations

import json

import pytest
import trainer_runs
import yaml
from axolotl_runs import write_recipe
from click.testing import CliRunner
from datasets import Dataset

from longlora_plugin.cli import longlora
from longlora_plugin.recipes.check import check_recipe
from longlora_plugin.recipes.data_lengths import lengths_of_texts
from longlora_plugin.run.document_lengths import DocumentLengths, lengths_in


@pytest.fixture
def recipe(tmp_path, tiny_model_dir):
    """Function (words a document, **keys) → a recipe from 64 to 256 tokens with such data."""

    def write(words: int, **keys: object):
        rows = [{"text": "kan losa miri rudo " * (words // 4)}] * 8
        data = tmp_path / "data.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return write_recipe(tmp_path, tiny_model_dir("untied"), data, max_steps=1, **keys)

    return write


def test_share_counts_the_tokens_after_the_base_context_of_each_document():
    measured = DocumentLengths.of([10, 64, 100, 164], 64, 256)
    assert (measured.documents, measured.longest, measured.tokens) == (4, 164, 338)
    assert measured.share_beyond == (36 + 100) / 338
    assert measured.warning() is None


def test_no_document_beyond_the_base_context_is_a_warning_that_names_the_remedy():
    warning = DocumentLengths.of([10, 64], 64, 256).warning()
    for part in ("64 to 256 tokens", "of 2 has 64", "longlora longqa build", "sample_packing"):
        assert part in warning
    assert DocumentLengths.of([], 64, 256).warning()


def test_a_recipe_that_extends_nothing_is_not_warned_about_its_data():
    assert DocumentLengths.of([10], 256, 256).warning() is None


def test_packed_rows_count_as_their_documents():
    rows = [[0, 1, 2, 0, 1], [0, 1, 2, 3], [4, 5, 0]]  # the third goes on in the middle of one
    dataset = Dataset.from_dict({"input_ids": [[7] * len(r) for r in rows], "position_ids": rows})
    assert lengths_in(dataset) == [3, 2, 4, 2, 1]
    assert lengths_in(dataset.select([1, 0])) == [4, 3, 2]


def test_rows_without_positions_and_pairs_of_prompt_and_answer_are_measured():
    assert lengths_in(Dataset.from_dict({"input_ids": [[1, 2], [3]]})) == [2, 1]
    pairs = Dataset.from_dict({"prompt_ids": [[1, 2]], "chosen_ids": [[3]], "rejected_ids": [[4]]})
    assert lengths_in(pairs) == [3]


def test_streamed_and_unknown_data_have_no_lengths():
    assert lengths_in(Dataset.from_dict({"input_ids": [[1]]}).to_iterable_dataset()) is None
    assert lengths_in(Dataset.from_dict({"text": ["a"]})) is None


def test_the_longest_text_is_counted_wherever_it_is():
    texts = ["ab " * 10] * 500 + ["ab " * 999] + ["ab " * 10] * 500
    lengths = lengths_of_texts(texts, lambda text: len(text.split()))
    assert (max(lengths), len(lengths), lengths[-1]) == (999, 1001, 10)


def test_check_warns_of_short_documents_and_strict_refuses_them(recipe):
    path = recipe(8)
    report = check_recipe(path)
    assert report.ok
    assert "datasets: this data cannot extend the context from 64 to 256" in report.warnings[0]
    assert report.resolved["data"]["share_beyond"] == 0
    strict = CliRunner().invoke(longlora, ["recipes", "check", "--strict", str(path)])
    assert strict.exit_code == 1
    assert "cannot extend the context" in strict.output
    assert CliRunner().invoke(longlora, ["recipes", "check", str(path)]).exit_code == 0


def test_check_takes_long_documents_and_says_their_lengths(recipe):
    report = check_recipe(recipe(100))
    assert not report.warnings
    assert any("beyond the base model's context of 64" in note for note in report.notes)


def test_rows_that_axolotl_would_drop_do_not_count(recipe):
    path = recipe(400)
    raw = yaml.safe_load(path.read_text())
    raw["datasets"][0]["type"] = "alpaca"
    path.write_text(yaml.safe_dump(raw))
    assert "the longest of 0" in check_recipe(path).warnings[0]
    path.write_text(yaml.safe_dump(raw | {"excess_length_strategy": "truncate"}))
    assert not check_recipe(path).warnings


@pytest.mark.e2e
def test_a_packed_run_on_short_documents_warns_and_prepared_data_is_enough_for_check(recipe):
    path = recipe(8, sample_packing=True, pad_to_sequence_len=True)
    run = trainer_runs.train(path).ok()
    assert "LongLoRA data: 8 documents" in run.log
    assert "this data cannot extend the context from 64 to 256 tokens" in run.log
    raw = yaml.safe_load(path.read_text())
    raw["datasets"][0]["path"] = "nobody/has-this"
    path.write_text(yaml.safe_dump(raw))
    assert "prepared" in next(note for note in check_recipe(path).notes if "documents" in note)
    assert check_recipe(path).warnings

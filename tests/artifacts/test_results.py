"""Figures measured later, on the cards of the run and of its merged model."""

from __future__ import annotations

import pytest

from longlora_plugin.artifacts.manifest import Manifest, read_manifest, write_manifest
from longlora_plugin.artifacts.results import add_results, check_has_card

EVAL = {"model": "adapter", "data": "books", "length": 2048, "perplexity": 35.25, "score": "new"}
PASSKEY = {"model": "adapter", "length": 2048, "depth": 0.5, "accuracy": 0.9}
BENCH = {"model": "adapter", "task": "niah", "metric": "exact", "length": 4096, "score": 0.75}


@pytest.fixture
def run(tmp_path):
    for folder in (tmp_path, tmp_path / "merged"):
        folder.mkdir(exist_ok=True)
        write_manifest(folder, Manifest("base", 4096, adapter="longlora"))
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_text("")
    return tmp_path


def test_figures_of_each_command_are_on_both_cards(run):
    cards = add_results(run, [EVAL, PASSKEY, BENCH])
    assert cards == [run / "README.md", run / "merged" / "README.md"]
    for card in cards:
        text = card.read_text()
        for line in (
            "| perplexity | books | 2048 | 35.25 |  |",
            "| passkey accuracy |  | 2048 | 0.9 | 0.5 |",
            "| niah (exact) |  | 4096 | 0.75 |  |",
        ):
            assert line in text
    assert "library_name: peft" in cards[0].read_text()
    assert "library_name: transformers" in cards[1].read_text()


def test_a_figure_that_is_measured_again_is_replaced(run):
    add_results(run, [EVAL, PASSKEY])
    add_results(run, [{**EVAL, "perplexity": 30.5}])
    text = (run / "README.md").read_text()
    assert "30.5" in text
    assert "35.25" not in text
    assert "passkey accuracy" in text
    manifest = read_manifest(run)
    assert manifest is not None
    assert len(manifest.results) == 2


def test_a_folder_without_a_record_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no longlora\.json"):
        check_has_card(tmp_path)

"""What a real run and a real merge leave in their folders, and what ties weights to their RoPE."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from axolotl_runs import CONTEXT, merge_lora
from huggingface_hub import ModelCard
from trainer_runs import Run, train, write_recipe

from longlora_plugin.artifacts.load import load_model
from longlora_plugin.artifacts.manifest import Manifest, read_manifest

pytestmark = pytest.mark.e2e

KEYS = {"longlora": {"rope": "yarn", "full_attention_steps": 2}}
CARD_WORDS_OF_OTHERS = ("trained from scratch", "More Information Needed", "Model ID")


@pytest.fixture(scope="module")
def base(tiny_model_dir):
    return tiny_model_dir("artifacts", tie_word_embeddings=True, initializer_range=0.2)


@pytest.fixture(scope="module")
def run(tmp_path_factory, base, tiny_dataset) -> Run:
    folder = tmp_path_factory.mktemp("artifacts")
    return train(write_recipe(folder, base, tiny_dataset, KEYS)).ok()


@pytest.fixture
def recipe(tmp_path, run, base, tiny_dataset):
    """Function (changed keys) → a recipe whose output_dir is a copy of the run's."""
    shutil.copytree(run.output_dir, tmp_path / "out")
    return lambda **keys: write_recipe(tmp_path, base, tiny_dataset, {**KEYS, **keys})


def manifest_in(folder: Path) -> Manifest:
    manifest = read_manifest(folder)
    assert manifest is not None, folder
    return manifest


@pytest.mark.parametrize(("where", "steps", "full"), [("checkpoint-3", 3, 0), (".", 6, 2)])
def test_a_saved_folder_says_what_was_trained(run, base, where, steps, full):
    folder = run.output_dir / where
    manifest = manifest_in(folder)
    assert (manifest.steps, manifest.full_attention_steps) == (steps, full)
    assert manifest.base_model == str(base)
    assert manifest.adapter == "longlora"
    assert manifest.rope_preset == "yarn"
    assert manifest.rope_parameters["factor"] == 128 / CONTEXT
    assert (manifest.base_context, manifest.target_context) == (CONTEXT, 128)
    assert (manifest.group_size, manifest.covered_layers) == (32, 2)
    assert manifest.trained_modules == 7
    assert manifest.recipe["adapter"] == "longlora"
    assert list(manifest.data_digests.values())
    assert manifest.versions["axolotl"]
    text = (folder / "README.md").read_text()
    assert not [words for words in CARD_WORDS_OF_OTHERS if words in text]
    assert ModelCard(text).data.tags[:2] == ["longlora", "long-context"]
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_a_merged_folder_says_it_too_and_loads_as_the_adapter_does(recipe, tmp_path):
    merged = merge_lora(recipe())
    assert manifest_in(merged) == manifest_in(tmp_path / "out")
    card = ModelCard.load(merged / "README.md")
    assert "merged" in card.text
    assert card.data.library_name == "transformers"
    tokens = torch.arange(3, 103)[None]
    with torch.no_grad():
        adapter, whole = (
            load_model(folder, dtype=torch.float32)(tokens).logits
            for folder in (tmp_path / "out", merged)
        )
    torch.testing.assert_close(whole, adapter, atol=0.05, rtol=0.05)  # merged in bf16


@pytest.mark.parametrize(
    "keys",
    [
        {"longlora": {"rope": "linear"}},
        {"longlora": {"rope": {"preset": "yarn", "factor": 8}}},
        {"sequence_len": 256},
    ],
    ids=["preset", "factor", "sequence_len"],
)
def test_merging_with_another_rope_is_refused_by_name(recipe, keys):
    with pytest.raises(Exception, match=r"does not belong to this recipe's RoPE.*rope: yarn"):
        merge_lora(recipe(**keys))


@pytest.mark.parametrize(
    "start", [{"lora_model_dir": "out"}, {"resume_from_checkpoint": "out/checkpoint-3"}]
)
def test_going_on_with_another_rope_is_refused_by_name(recipe, tmp_path, start):
    keys = {key: str(tmp_path / value) for key, value in start.items()}
    run = train(recipe(longlora={"rope": "linear"}, output_dir=str(tmp_path / "new"), **keys))
    assert any(run.codes)
    assert "does not belong to this recipe's RoPE" in run.log
    assert next(iter(start)) in run.log


def test_a_killed_second_run_leaves_the_first_runs_adapter_tied_to_its_rope(recipe, tmp_path):
    # The trainer writes the second run's config.json into the folder before its first step.
    changed = recipe(longlora={"rope": "linear"}, max_steps=5)
    run = train(changed, env={"LONGLORA_TEST_KILL_AFTER": "1"})
    assert any(run.codes)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_parameters"]["rope_type"] == "linear"
    assert manifest_in(tmp_path / "out").rope_preset == "yarn"
    with pytest.raises(Exception, match="does not belong to this recipe's RoPE"):
        merge_lora(changed)

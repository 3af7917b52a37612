"""What a real run and a real merge leave in their folders, and what ties weights to their RoPE."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from axolotl_runs import CONTEXT, merge_lora
from hub import put_on_hub
from huggingface_hub import ModelCard
from trainer_runs import Run, adapter, train, write_recipe
from transformers import AutoConfig

from longlora_plugin import plugin
from longlora_plugin.artifacts.load import load_model
from longlora_plugin.artifacts.manifest import Manifest, read_manifest

pytestmark = pytest.mark.e2e

BLOCK = {"rope": "yarn", "full_attention_steps": 2}
KEYS = {"longlora": {**BLOCK, "embeddings_dtype": "bfloat16"}}
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


def test_embeddings_are_rounded_in_the_finished_adapter_only(run):
    def dtypes(folder: Path) -> dict[str, torch.dtype]:
        return {name: tensor.dtype for name, tensor in adapter(folder).items()}

    assert set(dtypes(run.output_dir / "checkpoint-6").values()) == {torch.float32}
    for name, dtype in dtypes(run.output_dir).items():
        is_table = "embed_tokens" in name or "lm_head" in name
        assert dtype == (torch.bfloat16 if is_table else torch.float32), name


def test_lora_on_embeddings_trains_and_is_small_enough_to_serve(tmp_path, base, tiny_dataset):
    keys = {
        "longlora": {**BLOCK, "trainable": []},
        "lora_target_modules": ["q_proj", "v_proj", "embed_tokens"],
        "max_steps": 2,
    }
    recipe = write_recipe(tmp_path, base, tiny_dataset, keys)
    run = train(recipe).ok()
    assert all("lora_" in name for name in run.adapter)
    moved = run.adapter["base_model.model.model.embed_tokens.lora_embedding_B"]
    assert moved.abs().max() > 0
    saved = json.loads((run.output_dir / "adapter_config.json").read_text())
    assert not saved["modules_to_save"]  # what vLLM asks for
    merged = merge_lora(recipe)
    tokens = torch.arange(3, 103)[None]
    with torch.no_grad():
        lora, whole = (
            load_model(folder, dtype=torch.float32)(tokens).logits
            for folder in (run.output_dir, merged)
        )
    torch.testing.assert_close(whole, lora, atol=0.05, rtol=0.05)


def test_a_stranger_loads_what_was_uploaded_as_the_page_says(run, recipe, tmp_path, monkeypatch):
    recipe_file = recipe()
    merge_lora(recipe_file)
    out = tmp_path / "out"
    page = (Path(__file__).parents[2] / "docs/howto/share.md").read_text()
    upload = re.search(r"hf upload \S+ outputs/run \\\n(.*)\n", page)
    assert upload
    excluded = shlex.split(upload[1].replace("--exclude", ""))
    put_on_hub(out, "me/adapter", tmp_path / "hub", monkeypatch, excluded)
    put_on_hub(out / "merged", "me/merged", tmp_path / "hub", monkeypatch)
    uploaded = {path.name for path in (tmp_path / "hub").glob("models--me--adapter/snapshots/*/*")}
    assert "checkpoint-3" not in uploaded
    assert "merged" not in uploaded
    tokens = torch.arange(3, 103)[None]
    monkeypatch.chdir(tmp_path)
    with torch.no_grad():
        expected = load_model(out, dtype=torch.float32)(tokens).logits
        for name in ("me/adapter", "me/merged"):
            found = load_model(name, dtype=torch.float32)(tokens).logits
            torch.testing.assert_close(found, expected, atol=0.05, rtol=0.05)
            model = model_of_the_cards_code(name, tmp_path / "hub").eval()
            assert model.config.rope_parameters["rope_type"] == "yarn"
            # In bf16, as the run computed: single logits differ, RoPE would move all of them.
            assert (model(tokens).logits.float() - expected).abs().mean() < 0.05


def model_of_the_cards_code(name: str, hub: Path):
    (card,) = hub.glob(f"models--{name.replace('/', '--')}/snapshots/*/README.md")
    code = re.search(r"```python\n(.*?)```", card.read_text(), re.DOTALL)
    assert code
    folder = re.search(r'"(out|merged)"', code[1])
    assert folder
    names: dict = {}
    exec(code[1].replace(folder[0], f'"{name}"'), names)  # "or its name on the hub"
    return names["model"]


def test_a_merged_folder_says_it_too_and_loads_as_the_adapter_does(recipe, tmp_path):
    merged = merge_lora(recipe())
    trained = manifest_in(tmp_path / "out")
    assert replace(manifest_in(merged), files=trained.files) == trained
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
        {"longlora": {"rope": "linear"}, "sequence_len": 256},
    ],
    ids=["preset", "factor", "preset and length"],
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


def test_another_length_alone_is_told_by_name_and_what_was_trained_is_merged(
    recipe, tmp_path, monkeypatch
):
    told: list[str] = []
    monkeypatch.setattr(plugin.log, "warning", lambda line, *given: told.append(line % given))
    changed = recipe(sequence_len=256, model_config={"attention_dropout": 0.5})
    merged = merge_lora(changed, lora_model_dir=str(tmp_path / "out/checkpoint-3"))
    trained, config = manifest_in(tmp_path / "out"), AutoConfig.from_pretrained(merged)
    assert trained.rope_parameters.items() <= config.rope_parameters.items()
    assert config.max_position_embeddings == manifest_in(merged).target_context == 128
    given = [line for line in told if "sequence_len: the adapter was trained with 128" in line]
    assert given
    assert given[0].endswith("the recipe says 256; it is merged as it was trained")
    for field in ("rope_parameters", "attention_dropout"):
        assert any(f"{field}: the run was trained with" in line for line in told)
    assert config.attention_dropout == 0.0


def test_what_a_run_started_from_or_was_judged_by_does_not_keep_it_from_being_merged(
    recipe, tmp_path
):
    gone = str(tmp_path / "gone")
    block = {**KEYS["longlora"], "held_out": f"{gone}.txt"}
    changed = recipe(rl="dpo", longlora=block, resume_from_checkpoint=gone)
    merged = merge_lora(changed, lora_model_dir=str(tmp_path / "out/checkpoint-3"))
    assert manifest_in(merged).steps == 3


@pytest.mark.parametrize(
    ("changes", "file"),
    [
        ({"longlora": {"rope": "linear"}}, "config"),
        ({"lora_alpha": 64}, "adapter_config"),
        ({}, None),
    ],
    ids=["RoPE", "alpha", "the same"],
)
def test_a_killed_second_run_leaves_the_first_runs_adapter_tied_to_its_files(
    recipe, tmp_path, changes, file
):
    # Axolotl writes the second run's files into the folder before its first step.
    changed = recipe(max_steps=5, **changes)
    run = train(changed, env={"LONGLORA_TEST_KILL_AFTER": "1"})
    assert any(run.codes)
    assert manifest_in(tmp_path / "out").rope_preset == "yarn"
    if file is None:
        merge_lora(changed)
        return
    with pytest.raises(Exception, match=rf"another {file}\.json.*lora_model_dir"):
        merge_lora(changed)
    with pytest.raises(ValueError, match="a later run began in the same folder"):
        load_model(tmp_path / "out")

"""`longlora.json`: what is written is read back, and nothing secret is written."""

from __future__ import annotations

import hashlib

import pytest
from hub import put_on_hub
from huggingface_hub import constants
from transformers import LlamaConfig

from longlora_plugin.artifacts.manifest import (
    FILE,
    Manifest,
    data_digests,
    digest,
    public_recipe,
    read_manifest,
    versions,
    why_another_rope,
    write_manifest,
)
from longlora_plugin.run.manifest import check_start
from longlora_plugin.run.prepare import prepare_run

MANIFEST = Manifest(
    "meta/llama",
    32768,
    rope_preset="yarn",
    rope_parameters={"rope_type": "yarn", "factor": 8.0},
    uncovered_layers={"sliding window": 2},
    results=[{"metric": "perplexity", "value": 7.5}],
)


def test_a_manifest_is_read_as_it_was_written(tmp_path):
    write_manifest(tmp_path, MANIFEST)
    assert read_manifest(tmp_path) == MANIFEST
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_a_folder_without_one_has_none(tmp_path):
    assert read_manifest(tmp_path) is None


@pytest.mark.parametrize("text", ["", '{"format": 1, "base', "[]", '{"format": 1}', "{}"])
def test_a_damaged_file_is_named(tmp_path, text):
    (tmp_path / FILE).write_text(text)
    with pytest.raises(ValueError, match=r"longlora\.json is damaged"):
        read_manifest(tmp_path)


def test_a_later_format_is_refused(tmp_path):
    (tmp_path / FILE).write_text('{"format": 99}')
    with pytest.raises(ValueError, match=r"format 99.*newer longlora-plugin"):
        read_manifest(tmp_path)


def test_unknown_keys_of_a_later_version_are_left_out(tmp_path):
    write_manifest(tmp_path, MANIFEST)
    text = (tmp_path / FILE).read_text().replace("{", '{"added_later": 1,', 1)
    (tmp_path / FILE).write_text(text)
    assert read_manifest(tmp_path) == MANIFEST


def test_secrets_are_left_out_and_token_settings_stay():
    recipe = {
        "hub_token": "x",
        "wandb_api_key": "x",
        "comet_api_key": "x",
        "password": "x",
        "special_tokens": {"pad_token": "<pad>"},
        "tokens": ["<a>"],
        "sequence_len": 64,
    }
    assert public_recipe(recipe) == {
        "special_tokens": {"pad_token": "<pad>"},
        "tokens": ["<a>"],
        "sequence_len": 64,
    }


def test_the_digest_follows_the_recipe_and_not_the_order_of_its_keys():
    one = {"sequence_len": 64, "longlora": {"rope": "yarn", "group_size": 8}}
    same = {"longlora": {"group_size": 8, "rope": "yarn"}, "sequence_len": 64}
    assert digest(one) == digest(same) != digest({**one, "sequence_len": 128})


def test_local_data_files_have_digests_and_hub_names_none(tmp_path):
    data = tmp_path / "train.jsonl"
    data.write_text("{}\n")
    recipe = {
        "datasets": [{"path": str(data)}, {"path": "json", "data_files": [str(data)]}],
        "test_datasets": [{"path": "someone/hub-data"}],
    }
    assert data_digests(recipe) == {str(data): hashlib.sha256(b"{}\n").hexdigest()}
    assert data_digests({}) == {}


def test_versions_are_those_installed():
    import torch

    assert versions()["torch"] == str(torch.__version__)


def test_another_rope_is_told_and_the_same_in_other_numbers_is_not():
    assert why_another_rope(MANIFEST, {"factor": 8, "rope_type": "yarn"}) is None
    assert "factor" in str(why_another_rope(MANIFEST, {"factor": 4, "rope_type": "yarn"}))
    assert why_another_rope(Manifest("base", 64), {"rope_type": "linear"}) is None


@pytest.mark.parametrize("cached", [True, False])
def test_an_adapter_of_the_hub_is_checked_where_it_can_be_read_and_else_a_warning_says_so(
    tmp_path, monkeypatch, cached
):
    recipe = {"base_model": "base", "adapter": "longlora", "sequence_len": 1024}
    recipe |= {"longlora": {"rope": "linear"}, "lora_model_dir": "someone/adapter"}
    run = prepare_run(recipe, LlamaConfig(max_position_embeddings=128)).checked()
    if not cached:
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        assert "someone/adapter" in check_start(run)[0]
        return
    write_manifest(tmp_path / "local", MANIFEST)
    put_on_hub(tmp_path / "local", "someone/adapter", tmp_path / "hub", monkeypatch)
    with pytest.raises(ValueError, match="lora_model_dir: someone/adapter does not belong"):
        check_start(run)

"""The merged folder as a whole: killed merges, limits, and the run's config before the recipe's."""

from __future__ import annotations

import json
import os
import shutil
import sys
from functools import partial
from pathlib import Path

import adapters
import pytest
import torch
from adapters import logits, move_and_save, wrapped
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from longlora_plugin.artifacts.callback import finish
from longlora_plugin.artifacts.manifest import Manifest, write_manifest
from longlora_plugin.merge.folder import Source, check_loads, merge
from longlora_plugin.merge.limits import raise_limits

base_folder = partial(adapters.base_folder, max_shard_size="30KB")
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 10000.0,
}


def adapter_folder(base: Path, folder: Path, scale: float = 0.05, **config: object) -> Path:
    """An adapter whose run had `config` in addition to the base's, as it saved it."""
    trained = AutoConfig.from_pretrained(base)
    for name, value in config.items():
        setattr(trained, name, value)
    model = AutoModelForCausalLM.from_pretrained(base, config=trained, dtype=torch.float32)
    move_and_save(wrapped(model), folder, scale)
    trained.save_pretrained(folder)
    return folder


def merged_logits(folder: Path) -> torch.Tensor:
    return logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))


def source(base: Path, adapter: Path, **options: object) -> Source:
    return Source(adapter, base, AutoConfig.from_pretrained(base), **options)


# ---- killed ---------------------------------------------------------------------------------


def merge_and_finish(job: Source, target: Path) -> None:
    """A merge as the plugin runs it; the record names the adapter."""
    record = Manifest(job.adapter_dir.name, 256, adapter="longlora")
    merge(job, target, finish=lambda draft: finish(draft, record, "merged", called=target))


def merge_killed_at(step: int, job: Source, target: Path) -> int:
    """Merge in a child process that dies at its `step`-th change of the file system."""
    child = os.fork()
    if child == 0:
        left = [step]

        def die(event: str, arguments: tuple) -> None:
            writes = event == "open" and arguments[1] and set("wxa+") & set(str(arguments[1]))
            changes = event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir")
            if writes or changes:
                left[0] -= 1
                if left[0] == 0:
                    os._exit(77)

        try:
            sys.addaudithook(die)
            merge_and_finish(job, target)
        finally:
            os._exit(0 if left[0] > 0 else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_merge_killed_anywhere_over_an_older_one_leaves_one_of_them_or_none(tmp_path):
    base = base_folder(tmp_path)
    older = adapter_folder(base, tmp_path / "older")
    newer = adapter_folder(
        base, tmp_path / "newer", 0.1, rope_parameters=LINEAR, max_position_embeddings=256
    )
    target, kept = tmp_path / "merged", tmp_path / "kept"
    merge_and_finish(source(base, older), target)
    assert len(list(target.glob("*.safetensors"))) > 1
    shutil.copytree(target, kept)
    right = tmp_path / "other" / tmp_path.name / "merged"  # the card's title has both names
    merge_and_finish(source(base, newer), right)
    whole = [
        {path.name: path.read_bytes() for path in folder.iterdir()} for folder in (kept, right)
    ]
    for folder in whole:
        assert {"README.md", "longlora.json"} <= set(folder)
    codes, absent = [], 0
    for step in range(1, 200):
        codes.append(merge_killed_at(step, source(base, newer), target))
        if target.is_dir():
            assert {path.name: path.read_bytes() for path in target.iterdir()} in whole
        else:
            absent += 1
        if codes[-1] == 0:
            break
        # The next merge starts from what this one left, as a user's would.
    assert codes[-1] == 0
    assert set(codes[:-1]) == {77}
    assert len(codes) > 20
    assert absent <= 2
    assert {path.name: path.read_bytes() for path in target.iterdir()} == whole[1]
    assert {path.name for path in tmp_path.glob("merged*")} == {"merged"}


def test_folder_that_lacks_a_tensor_does_not_pass(tmp_path):
    base = base_folder(tmp_path)
    index = json.loads((base / "model.safetensors.index.json").read_text())
    (base / index["weight_map"]["model.norm.weight"]).unlink()
    with pytest.raises(ValueError, match="transformers cannot load"):
        check_loads(base)


def test_a_users_words_and_the_bases_license_stay_and_what_tells_of_the_base_goes(tmp_path):
    base = base_folder(tmp_path)
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# base, 64 tokens\n")
    for file in ("trainer_state.json", "params.json", "processor_config.json"):
        (base / file).write_text("{}")
    job = source(base, adapter_folder(base, tmp_path / "adapter"))
    merge_and_finish(job, tmp_path / "merged")
    card = tmp_path / "merged" / "README.md"
    first = card.read_text()
    assert "license: apache-2.0" in first
    assert "base, 64 tokens" not in first
    assert "unfinished" not in first
    assert not (tmp_path / "merged" / "trainer_state.json").exists()
    assert not (tmp_path / "merged" / "params.json").exists()
    assert (tmp_path / "merged" / "processor_config.json").is_file()
    card.write_text(f"{first}\nMy words.\n")
    merge_and_finish(job, tmp_path / "merged")
    assert card.read_text().endswith("My words.\n")


# ---- the run's config -----------------------------------------------------------------------


def test_what_was_trained_is_merged_and_a_disagreement_is_named(tmp_path):
    base = base_folder(tmp_path, "mistral", sliding_window=16)
    adapter = adapter_folder(
        base,
        tmp_path / "adapter",
        sliding_window=None,
        rope_parameters=LINEAR,
        max_position_embeddings=256,
    )
    other = {**LINEAR, "factor": 8.0}
    recipe = {"rope_parameters": other, "max_position_embeddings": 512}
    told, _ = merge(source(base, adapter, recipe=recipe), tmp_path / "merged")
    config = AutoConfig.from_pretrained(base)
    config.sliding_window = None
    config.rope_parameters, config.max_position_embeddings = LINEAR, 256
    model = AutoModelForCausalLM.from_pretrained(base, config=config, dtype=torch.float32)
    expected = logits(PeftModel.from_pretrained(model, adapter))
    assert (merged_logits(tmp_path / "merged") - expected).abs().max() < 3e-5
    assert (merged_logits(base) - expected).abs().max() > 1e-2
    content = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert content["sliding_window"] is None
    assert content["rope_scaling"]["factor"] == content["rope_parameters"]["factor"] == 4.0
    assert any(
        line.startswith("max_position_embeddings: the run was trained with 256") for line in told
    )
    assert any("rope_parameters: the run was trained with" in line for line in told)


def test_checkpoint_without_a_config_is_merged_as_the_recipe_says(tmp_path):
    base = base_folder(tmp_path)
    adapter = adapter_folder(base, tmp_path / "adapter")
    (adapter / "config.json").unlink()
    recipe = {"rope_parameters": LINEAR, "max_position_embeddings": 256}
    assert merge(source(base, adapter, recipe=recipe), tmp_path / "merged") == ([], [])
    config = AutoConfig.from_pretrained(tmp_path / "merged")
    assert config.rope_parameters["factor"] == 4.0
    assert config.max_position_embeddings == 256


def test_adapter_in_a_folder_that_a_later_run_took_over_is_refused_by_name(tmp_path):
    base = base_folder(tmp_path)
    adapter = adapter_folder(
        base, tmp_path / "adapter", rope_parameters=LINEAR, max_position_embeddings=256
    )
    write_manifest(adapter, Manifest(str(base), target_context=256, rope_parameters=LINEAR))
    merge(source(base, adapter), tmp_path / "merged")
    config = AutoConfig.from_pretrained(adapter)
    config.rope_parameters = {**LINEAR, "factor": 8.0}
    config.save_pretrained(adapter)
    with pytest.raises(ValueError, match=r"saved with another config\.json, as its longlora"):
        merge(source(base, adapter), tmp_path / "merged")
    assert AutoConfig.from_pretrained(tmp_path / "merged").rope_parameters["factor"] == 4.0


def test_a_link_to_a_merged_folder_stays_a_link(tmp_path):
    base = base_folder(tmp_path)
    adapter = adapter_folder(base, tmp_path / "adapter")
    (tmp_path / "merged").symlink_to(tmp_path / "elsewhere")
    for _ in range(2):  # a first time, and over an earlier one
        merge(source(base, adapter), tmp_path / "merged")
        assert (tmp_path / "merged").is_symlink()
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            *("adapter", "base", "elsewhere", "merged")
        ]


# ---- limits ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rope", "contexts"),
    [(None, (64,)), (LLAMA3, (64, 512))],
    ids=["unscaled", "already scaled"],
)
@pytest.mark.parametrize("which", [0, -1])
def test_limits_that_repeat_a_context_of_the_base_are_raised(
    tmp_path, tiny_tokenizer, rope, contexts, which
):
    options = {} if rope is None else {"rope_parameters": rope, "max_position_embeddings": 512}
    base = base_folder(tmp_path, **options)
    limit = contexts[which]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer.backend_tokenizer)
    tokenizer.model_max_length = limit
    adapter = adapter_folder(
        base,
        tmp_path / "adapter",
        rope_parameters={**(rope or LINEAR), "factor": 16.0},
        max_position_embeddings=1024,
    )
    for folder in (base, adapter):
        tokenizer.save_pretrained(folder)
    (base / "generation_config.json").write_text(json.dumps({"max_length": limit}))
    merge(source(base, adapter), tmp_path / "merged")
    read = {
        name: json.loads((tmp_path / "merged" / name).read_text())
        for name in ("tokenizer_config.json", "generation_config.json", "config.json")
    }
    assert read["tokenizer_config.json"]["model_max_length"] == 1024
    assert read["generation_config.json"]["max_length"] == 1024
    assert read["config.json"]["max_position_embeddings"] == 1024


def test_limits_of_their_own_stay(tmp_path):
    limits = {"model_max_length": 100, "other": 64}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(limits))
    (tmp_path / "generation_config.json").write_text(json.dumps({"max_length": 64}))
    (tmp_path / "tokenizer.json").write_text(json.dumps({"truncation": {"max_length": 64}}))
    assert raise_limits(tmp_path, [64], 256) == [
        "generation_config.json has max_length: 256",
        "tokenizer.json has truncation.max_length: 256",
    ]
    assert json.loads((tmp_path / "tokenizer_config.json").read_text()) == limits

"""What `recipes check` finds, and the commands that list, show and start recipes."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import command
import numpy as np
import pytest
import yaml
from json_keys import assert_documented
from safetensors.numpy import save_file

from longlora_plugin.artifacts.manifest import Manifest, write_manifest
from longlora_plugin.recipes import available
from longlora_plugin.recipes import longlora_recipes as shipped
from longlora_plugin.recipes.check import check_recipe
from longlora_plugin.recipes.start import parse_setting

ROOT = Path(__file__).parents[2]
LLAMA = "meta-llama/Llama-2-7b-hf"


@pytest.fixture
def recipe(tmp_path: Path, bases: Path, monkeypatch: pytest.MonkeyPatch):
    """Function (**changes) → path of a right recipe with some keys changed, or taken out (None)."""
    monkeypatch.chdir(ROOT)

    def write(**changes: Any) -> Path:
        raw = {
            "base_model": str(bases / LLAMA),
            "plugins": ["longlora_plugin.LongLoRAPlugin"],
            "adapter": "longlora",
            "sequence_len": 32768,
            "datasets": [{"path": "data.jsonl", "ds_type": "json", "type": "completion"}],
            "micro_batch_size": 1,
            "gradient_accumulation_steps": 8,
            "num_epochs": 1,
            "learning_rate": 2e-5,
            "bf16": True,
            "attn_implementation": "flash_attention_2",
            **changes,
        }
        raw = {key: value for key, value in raw.items() if value is not None}
        path = tmp_path / "recipe.yml"
        path.write_text(yaml.safe_dump(raw))
        return path

    return write


run = partial(command.invoke, "recipes")


# ---- what `check` finds ---------------------------------------------------------------------


def test_a_right_recipe_has_neither_problems_nor_notes(recipe):
    report = check_recipe(recipe())
    assert (report.problems, report.notes) == ([], [])
    assert report.resolved["group_size"] == 8192


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"plugins": None}, ["plugins", "longlora_plugin.LongLoRAPlugin"]),
        ({"plugins": ["longlora_plugin.LongLoraPlugin"]}, ["LongLoraPlugin", "does not load"]),
        (
            {"plugins": ["longlora_plugin.LongLoRAPlugin", "nowhere.Plugin"]},
            ["there is no nowhere.Plugin"],
        ),
        ({"plugins": "longlora_plugin.LongLoRAPlugin"}, ["plugins", "write a list"]),
        ({"datasets": "data.jsonl"}, ["datasets", "valid list"]),
        ({"datasets": ["data.jsonl"]}, ["datasets.0", "block of keys"]),
        ({"sequence_lenght": 8192}, ["sequence_lenght", "sequence_len"]),
        (
            {"datasets": [{"path": "x", "type": "completion", "feild": "text"}]},
            ["datasets.0.feild", "field"],
        ),
        (
            {"datasets": [{"path": "x", "type": "completion", "shards": "many"}]},
            ["datasets.0.shards", "'many'"],
        ),
        ({"micro_batch_size": "two"}, ["micro_batch_size", "'two'"]),
        ({"sequence_len": "32k"}, ["sequence_len", "'32k'", "32768"]),
        ({"longlora": {"group_sise": 8}}, ["group_sise", "'group_size'"]),
        ({"longlora": {"group_size": 65536}}, ["65536", "larger than sequence_len"]),
        ({"longlora": {"group_size": 8, "group_size_ratio": 0.5}}, ["two answers"]),
        ({"longlora": ["rope"]}, ["write a block of keys"]),
        ({"longlora": {"rope": "yaarn"}}, ["'yaarn'", "'yarn'"]),
        ({"longlora": {"rope": {"preset": "yarn", "factor": 2}}}, ["factor 2", "too small"]),
        ({"longlora": {"trainable": ["norm"]}}, ["'norm'", "norms"]),
        ({"longlora": {"attention_pattern": "s3"}}, ["'s3'", "s2"]),
        ({"model_config": {"rope_theta": 1e6}}, ["two answers", "model_config"]),
        ({"attn_implementation": "sage"}, ["sage", "flash_attention_2"]),
        ({"lora_target_modules": ["w_pack"]}, ["w_pack"]),
        ({"deepspeed": "nowhere.json"}, ["nowhere.json", "does not exist"]),
        ({"longlora": {"trainable": ["head"]}}, ["'head'", "embeddings"]),
        ({"base_model": "./nowhere"}, ["base_model", "./nowhere"]),
        ({"base_model": None}, ["base_model"]),
        ({"adapter": "LongLoRA"}, ["write adapter: longlora"]),
        ({"adapter": "long-lora"}, ["write adapter: longlora"]),
        ({"s2_attention": True}, ["s2_attention", "remove the line"]),
        ({"scaling_softmax": True}, ["scaling_softmax", "shifted_attention: false"]),
        ({"sequence_len": 0}, ["sequence_len", "got 0", "32768"]),
        ({"sequence_len": -1}, ["sequence_len", "got -1"]),
        ({"sequence_len": True}, ["sequence_len", "got True"]),
        ({"sequence_len": 2048.5}, ["sequence_len", "got 2048.5"]),
        ({"sequence_len": "1M"}, ["sequence_len", "'1M'", "1048576"]),
        ({"sequence_len": "32Ki"}, ["sequence_len", "'32Ki'", "32768"]),
        ({"base_model": ""}, ["base_model", "write a name or a path"]),
        ({"base_model": 5}, ["base_model", "write a name or a path"]),
        ({"base_model": "my model"}, ["base_model", "my model does not exist"]),
        ({"lora_model_dir": "./nowhere"}, ["lora_model_dir", "nowhere"]),
    ],
)
def test_one_mistake_is_one_problem_that_names_it(recipe, changes, says):
    report = check_recipe(recipe(**changes))
    assert len(report.problems) == 1, report.problems
    for word in says:
        assert word in report.problems[0]


def test_an_adapter_to_go_on_from_is_compared_with_the_recipes_rope(recipe, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "adapter_config.json").write_text("{}")
    save_file({"a": np.zeros(1)}, tmp_path / "run" / "adapter_model.safetensors")
    linear = {"rope_type": "linear", "factor": 8.0, "rope_theta": 10000.0}
    write_manifest(
        tmp_path / "run", Manifest(LLAMA, 32768, rope_preset="linear", rope_parameters=linear)
    )
    start = str(tmp_path / "run")
    (problem,) = check_recipe(recipe(lora_model_dir=start)).problems
    assert f"lora_model_dir: {start} does not belong to this recipe's RoPE" in problem
    assert check_recipe(recipe(lora_model_dir=start, longlora={"rope": "linear"})).problems == []
    (note,) = check_recipe(recipe(lora_model_dir="someone/adapter")).notes
    assert "lora_model_dir: whether it was trained with this RoPE is not checked" in note
    both = recipe(lora_model_dir="someone/adapter", resume_from_checkpoint=start)
    other = f"resume_from_checkpoint: {start} does not belong to this recipe's RoPE"
    assert any(other in problem for problem in check_recipe(both).problems)


@pytest.mark.parametrize("path", ["nowhere.jsonl", "./data", "/nowhere/rows.parquet"])
def test_data_that_is_not_here_is_a_warning_and_strict_refuses_it(recipe, path):
    missing = recipe(datasets=[{"path": path, "type": "completion", "ds_type": "json"}])
    (warning,) = check_recipe(missing).warnings
    assert f"datasets.0: no file {path}" in warning
    assert warning in check_recipe(missing, strict=True).problems


def test_everything_that_is_wrong_is_said_at_once(recipe):
    path = recipe(
        plugins=None,
        sequence_lenght=4,
        micro_batch_size="two",
        deepspeed="nowhere.json",
        longlora={"group_sise": 8, "group_size": 7, "rope": "liner", "trainable": ["norm"]},
    )
    path.write_text(path.read_text() + "sequence_len: 16384\n")
    problems = "\n".join(check_recipe(path).problems)
    for word in (
        "plugins",
        "sequence_lenght",
        "'two'",
        "nowhere.json",
        "group_sise",
        "got 7",
        "'liner'",
        "'norm'",
        'duplicate key "sequence_len"',
    ):
        assert word in problems


def test_the_first_of_axolotls_cross_checks_that_fails_is_said(recipe):
    wrong = {"fsdp": {"fsdp": ["full_shard"]}, "evals_per_epoch": {"eval_steps": 10}}
    wrong["fsdp"]["deepspeed"] = "examples/configs/deepspeed/zero2.json"
    wrong["evals_per_epoch"]["evals_per_epoch"] = 2
    for word, keys in wrong.items():
        (problem,) = check_recipe(recipe(**keys)).problems
        assert word in problem
    both = check_recipe(recipe(**wrong["fsdp"], **wrong["evals_per_epoch"])).problems
    assert len(both) == 1


def test_a_pattern_of_an_installed_package_is_the_one_that_is_checked(recipe, monkeypatch):
    from longlora_plugin import attention, registry

    used = []
    find, enable = registry.find, attention.enable_shifted_attention
    mine = registry.find("longlora_attention_patterns", "s2")

    def with_mine(hook, name):
        return mine if name == "mine" else find(hook, name)

    def enabled(model, **options):
        used.append(options["pattern"])
        return enable(model, **options)

    for module in ("registry", "run.checks", "run.built"):
        monkeypatch.setattr(f"longlora_plugin.{module}.find", with_mine)
    monkeypatch.setattr(attention, "enable_shifted_attention", enabled)
    assert check_recipe(recipe(longlora={"attention_pattern": "mine"})).problems == []
    assert used == [mine]


def test_a_file_that_is_no_recipe_is_a_problem(tmp_path):
    path = tmp_path / "x.yml"
    for content, says in (("a: [1", "not valid YAML"), ("- 1", "is not a recipe")):
        path.write_text(content)
        assert says in check_recipe(path).problems[0]


def test_an_unreachable_hub_is_a_note_and_the_rest_is_still_checked(recipe):
    report = check_recipe(recipe(base_model="some-org/some-model"))
    assert report.problems == []
    assert any("some-org/some-model" in note and "--base-config" in note for note in report.notes)
    report = check_recipe(recipe(base_model="some-org/some-model", longlora={"rope": "liner"}))
    assert ["'liner'" in problem for problem in report.problems] == [True]


def test_memory_is_checked_where_a_gpu_is_named(recipe):
    path = recipe(gradient_checkpointing=True)
    assert check_recipe(path, gpu="h200-141gb").ok
    report = check_recipe(path, gpu="rtx4090-24gb")
    assert ["does not fit 1 × rtx4090-24gb" in problem for problem in report.problems] == [True]
    with pytest.raises(ValueError, match="unknown GPU"):
        check_recipe(path, gpu="rtx9999")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"sequence_len": 4096}, "not above the 4096 tokens"),
        ({"longlora": {"full_attention_below": 65536}}, "never runs"),
        ({"adapter": "lora", "longlora": {"trainable": ["norms"]}}, "trainable is not used"),
        ({"adapter": "lora", "lora_r": 8, "lora_alpha": 16}, "does nothing"),
        ({"deepspeed": "deepspeed_configs/zero2.json"}, "planned by its name"),
        ({"attn_implementation": "sdpa", "sample_packing": True}, "0.0 loss"),
    ],
)
def test_what_is_odd_but_runs_is_a_note(recipe, changes, says):
    if changes.get("adapter") == "lora":
        changes = {**changes, "lora_target_linear": True}
    report = check_recipe(recipe(**changes))
    assert report.problems == []
    assert any(says in note for note in report.notes), report.notes


def test_layers_that_shifted_attention_leaves_out_are_counted_in_a_note(recipe, bases):
    gemma = recipe(base_model=str(bases / "google/gemma-2-2b"), attn_implementation="eager")
    report = check_recipe(gemma)
    assert report.problems == []
    assert any("13 of the layers" in note for note in report.notes)


def test_a_check_leaves_axolotls_plugins_and_its_logger_as_they_were(recipe):
    import logging

    from axolotl.integrations.base import PluginManager

    manager = PluginManager.get_instance()
    logger = logging.getLogger("axolotl")
    before = dict(manager.plugins), logger.handlers[:], logger.level, logger.propagate
    check_recipe(recipe(plugins=["nowhere.Plugin"]))
    assert (dict(manager.plugins), logger.handlers[:], logger.level, logger.propagate) == before


def test_mistrals_first_version_needs_its_window_taken_away_as_the_recipe_says(recipe, bases):
    windowed = {"base_model": str(bases / "mistralai/Mistral-7B-v0.1"), "sequence_len": 65536}
    report = check_recipe(recipe(**windowed))
    assert any("sliding_window: null" in problem for problem in report.problems)
    freed = recipe(
        **windowed,
        model_config={"sliding_window": None},
        longlora={"original_context": 8192},
    )
    freed = check_recipe(freed)
    assert freed.problems == []
    assert freed.resolved["rope_parameters"]["factor"] == 8


# ---- the commands ---------------------------------------------------------------------------


def test_check_exits_0_for_right_1_for_wrong_2_for_misuse(recipe, tmp_path):
    good = recipe()
    assert run("check", good).exit_code == 0
    bad = tmp_path / "bad.yml"
    bad.write_text(good.read_text() + "longlora: {rope: liner}\n")
    result = run("check", good, bad, "--json", tmp_path / "found.json")
    assert result.exit_code == 1
    assert "recipe.yml: ok" in result.output
    assert "bad.yml: 1 problem" in result.output
    found = json.loads((tmp_path / "found.json").read_text())
    assert [row["ok"] for row in found] == [True, False]
    assert_documented("recipes check", found)
    assert "'liner'" in found[1]["problems"][0]
    assert found[0]["resolved"]["group_size"] == 8192
    assert run("check", tmp_path / "nowhere.yml").exit_code == 2
    assert run("check").exit_code == 2
    assert run("check", good, "--gpu", "rtx9999").exit_code == 2


def test_list_shows_every_recipe_and_show_prints_its_text(tmp_path):
    result = run("list", "--json", tmp_path / "list.json")
    assert result.exit_code == 0
    rows = {row["name"]: row for row in json.loads((tmp_path / "list.json").read_text())}
    assert_documented("recipes list", list(rows.values()))
    assert set(rows) == set(available())
    assert rows["qlora-24gb"]["sequence_len"] == 16384
    assert "24 GB" in rows["qlora-24gb"]["summary"]
    assert run("show", "qlora-24gb").output == shipped()["qlora-24gb"].read_text()
    unknown = run("show", "qlora-24")
    assert unknown.exit_code == 2
    assert "'qlora-24gb'" in unknown.output


def test_from_init_to_a_checked_recipe_in_two_commands_in_an_empty_folder(
    tmp_path, bases, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    result = run("init", "llama-2-7b-32k", "--set", f"base_model={bases / LLAMA}")
    assert result.exit_code == 0
    assert "next: longlora recipes check llama-2-7b-32k.yml" in result.output
    result = run("check", "llama-2-7b-32k.yml", "--gpu", "a100-80gb", "--gpus", 8)
    assert result.exit_code == 0, result.output
    assert "fits 8 × a100-80gb" in result.output


def test_init_keeps_comments_and_takes_the_deepspeed_file_along(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    target = tmp_path / "mine" / "long.yml"
    settings = ["sequence_len=65536", "longlora.rope={preset: yarn, factor: 16}", "wandb_mode=x"]
    args = [each for setting in settings for each in ("--set", setting)]
    result = run("init", "llama-2-7b-32k", "--output", target, *args)
    assert result.exit_code == 0
    raw = yaml.safe_load(target.read_text())
    original = yaml.safe_load(shipped()["llama-2-7b-32k"].read_text())
    assert raw == {
        **original,
        "sequence_len": 65536,
        "longlora": {**original["longlora"], "rope": {"preset": "yarn", "factor": 16}},
        "wandb_mode": "x",
        "deepspeed": "mine/deepspeed/zero2.json",
    }
    assert (tmp_path / "mine/deepspeed/zero2.json").read_text() == (
        ROOT / "examples/configs/deepspeed/zero2.json"
    ).read_text()
    comments = [
        line for line in shipped()["llama-2-7b-32k"].read_text().splitlines() if "#" in line
    ]
    kept = target.read_text()
    assert all(line.split("#", 1)[1].strip() in kept for line in comments)
    again = run("init", "llama-2-7b-32k", "--output", target)
    assert again.exit_code == 2
    assert "--force" in again.output
    assert run("init", "llama-2-7b-32k", "--output", target, "--force").exit_code == 0
    assert yaml.safe_load(target.read_text())["sequence_len"] == 32768


@pytest.mark.parametrize("setting", ["sequence_len", "=3", "a..b=1", "a=[1", "adapter.x=1"])
def test_a_setting_that_makes_no_sense_is_misuse(tmp_path, monkeypatch, setting):
    monkeypatch.chdir(tmp_path)
    result = run("init", "qlora-24gb", "--set", setting)
    assert result.exit_code == 2
    assert setting in result.output.replace("\n", " ")
    assert not list(tmp_path.iterdir())


def test_a_setting_is_read_as_yaml():
    assert parse_setting("longlora.rope=yarn") == (["longlora", "rope"], "yarn")
    assert parse_setting("a=3")[1] == 3
    assert parse_setting("a=null")[1] is None
    assert parse_setting("a=x=y")[1] == "x=y"

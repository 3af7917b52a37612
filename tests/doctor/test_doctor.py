"""`axolotl longlora doctor`: every claim is a trial, and a recipe that cannot run here fails."""

from __future__ import annotations

import importlib.util
import json
import sys
import tomllib
from functools import partial
from importlib import metadata
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import command
import pytest
import torch
import yaml
from axolotl_runs import write_recipe
from json_keys import assert_documented
from packaging.requirements import Requirement

from longlora_plugin import attention
from longlora_plugin.doctor import launcher_step, machine, trials

ROOT = Path(__file__).parents[2]
CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without GPU lacks")


@pytest.fixture
def recipe(tmp_path, tiny_model_dir, tiny_dataset):
    def make(**overrides: object):
        return write_recipe(tmp_path, tiny_model_dir("plain"), tiny_dataset, **overrides)

    return make


run = partial(command.invoke, "doctor", "--quick")


def state(name: str) -> trials.Trial:
    return trials.tried(name, trials.trials_for("cpu")[name][0])


# ---- the machine ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_attention_back_end_works_because_it_equals_the_definition(name):
    assert state(name).state == trials.WORKS


def test_attention_back_end_that_is_wrong_fails(monkeypatch):
    """The trial is no smoke test: a kernel that runs but attends to the wrong tokens is found."""
    from longlora_plugin.attention import backends, layout

    def unshifted(heads, group_size):
        return [0] * heads

    monkeypatch.setitem(
        sys.modules["longlora_plugin.attention"].shifted_sparse_attention.__kwdefaults__,
        "pattern",
        layout.AttentionPattern("wrong", unshifted),
    )
    assert attention.shifted_sparse_attention is backends.shifted_sparse_attention
    trial = state("sdpa")
    assert trial.state == trials.FAILS
    assert "S²-Attn is wrong by" in trial.detail


def test_missing_package_gives_the_install_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: None if name in ("deepspeed", "flash_attn") else find_spec(name),
    )
    for name, line in (("flash_attention_2", "flash-attn]"), ("deepspeed", "deepspeed]")):
        trial = state(name)
        assert trial.state == trials.MISSING
        assert "pip install" in trial.detail
        assert line in trial.detail


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_layer_has_the_gradient_of_its_dequantized_weights(bits):
    pytest.importorskip("bitsandbytes")
    assert state(f"bitsandbytes {bits}-bit").state == trials.WORKS


@CPU
def test_lost_gradient_after_an_evaluation_is_found(monkeypatch):
    """bitsandbytes repacks 4-bit weights on CPUs with avx512_bf16, and only there."""
    modules = pytest.importorskip("bitsandbytes.nn.modules")
    name = f"bitsandbytes 4-bit{trials.AFTER_EVALUATION}"
    repacks = modules.has_avx512bf16()
    assert state(name).state == (trials.FAILS if repacks else trials.WORKS)
    monkeypatch.setattr(modules, "has_avx512bf16", lambda: False)
    assert state(name).state == trials.WORKS


def test_fsdp_step_runs_in_a_process_of_its_own():
    trial = state("fsdp")
    assert trial.state == trials.WORKS, trial.detail
    assert "equals plain SGD" in trial.detail
    assert not torch.distributed.is_initialized()


def test_launcher_that_dies_or_hangs_is_a_finding(monkeypatch):
    monkeypatch.setattr(trials, "_need", lambda module: None)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert state("deepspeed").detail == "ValueError: it ended with exit status 1"
    monkeypatch.setattr(trials, "LAUNCHER_SECONDS", 0.0)
    assert "no answer after" in state("fsdp").detail


def test_axolotl_of_another_version_is_a_problem():
    assert machine.unsupported_versions(machine.versions()) == []
    (problem,) = machine.unsupported_versions({"axolotl": "0.18.0"})
    assert 'pip install "axolotl' in problem


def test_checkout_that_is_not_installed_is_no_error(monkeypatch):
    def not_installed(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(machine, "requires", not_installed)
    monkeypatch.setattr("longlora_plugin.artifacts.manifest.version", not_installed)
    assert machine.unsupported_versions(machine.versions()) == []
    assert machine.unsupported_extras(machine.versions()) == []
    result = run()
    assert result.exit_code == 0, result.output
    assert machine.DISTRIBUTION in result.output


def test_optional_package_outside_axolotls_bounds_is_named_with_the_bound(monkeypatch):
    lines = ["torch>=2", 'deepspeed<0.19.0,>=0.18.6; extra == "deepspeed"']
    monkeypatch.setattr(machine, "requires", lambda name: lines)
    found = {"axolotl": "0.19.0", "torch": "2.13.0", "deepspeed": "0.19.8"}
    (note,) = machine.unsupported_extras(found)
    assert note.startswith("deepspeed 0.19.8 is installed; axolotl 0.19.0 is made for ")
    assert machine.unsupported_extras({**found, "deepspeed": "0.18.9"}) == []
    assert machine.unsupported_extras({**found, "deepspeed": None}) == []


def test_our_deepspeed_extra_is_within_what_every_supported_axolotl_allows():
    """It is Axolotl's own extra (0.19: <0.19.0,>=0.18.6; 0.21: <0.20.0,>=0.18.6)."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert extras["optional-dependencies"]["deepspeed"] == ["axolotl[deepspeed]"]
    (bound,) = [
        requirement
        for requirement in map(Requirement, metadata.requires("axolotl") or [])
        if requirement.name == "deepspeed"
    ]
    assert bound.specifier.contains(metadata.version("deepspeed"))


@pytest.mark.parametrize(("major", "bf16"), [(7, False), (8, True)], ids=["T4", "A100"])
def test_emulated_bf16_is_no_bf16(monkeypatch, major, bf16):
    """torch on a T4 or V100 can make bf16 tensors, and computes them slowly in fp32."""
    properties = SimpleNamespace(name="a GPU", total_memory=16 * 2**30, major=major)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda device: True)
    assert machine.this_device()["bf16"] is bf16


def test_deepspeed_step_is_compared_without_the_clipping_it_does_by_default(monkeypatch):
    """DeepSpeed 0.19 clips gradients at 1 unless told otherwise; plain SGD does not."""
    seen = {}

    class Engine:
        def __init__(self, model, optimizer):
            self.module, self.optimizer = model, optimizer

        def __call__(self, x):
            return self.module(x)

        def backward(self, loss):
            loss.backward()

        def step(self):
            clip = seen.get("gradient_clipping", 1.0)
            if clip:
                torch.nn.utils.clip_grad_norm_(self.module.parameters(), clip)
            self.optimizer.step()

    def initialize(model, optimizer, config):
        seen.update(config)
        return Engine(model, optimizer), optimizer, None, None

    double = SimpleNamespace(
        init_distributed=lambda backend: None, initialize=initialize, __version__="0.19.8"
    )
    monkeypatch.setitem(sys.modules, "deepspeed", double)
    assert "equals plain SGD" in launcher_step.try_deepspeed("cpu")


def test_report_without_a_recipe_is_complete_and_exits_0(tmp_path):
    path = tmp_path / "doctor.json"
    result = run("--json", path)
    assert result.exit_code == 0, result.output
    report = json.loads(path.read_text())
    assert_documented("doctor", report)
    assert report["runs"] is None
    assert {"axolotl", "transformers", "peft", "torch", "deepspeed"} <= report["versions"].keys()
    states = {trial["name"]: trial["state"] for trial in report["trials"]}
    assert states["sdpa"] == "works"
    assert states["deepspeed"] == states["fsdp"] == "not tried"
    assert states.keys() >= trials.BACKENDS.keys()


def test_two_processes_that_share_a_row_are_tried_and_equal_one():
    tried = state("context_parallel")
    assert tried.state == trials.WORKS, tried.detail
    assert "exchange 2,048 bytes a layer" in tried.detail  # K and V of 8 tokens, one head of 32


# ---- a recipe -------------------------------------------------------------------------------


def test_recipe_that_runs_says_what_is_on_and_off(tmp_path, recipe, tiny_tokenizer):
    path = tmp_path / "doctor.json"
    result = run(
        recipe(longlora={"rope": "yarn", "full_attention_steps": 0.1}, fp16=False), "--json", path
    )
    assert result.exit_code == 0, result.output
    assert "can run here" in result.output
    report = json.loads(path.read_text())
    assert_documented("doctor", report)
    assert report["runs"] is True
    found = {each["what"]: each for each in report["findings"]}
    assert "'rope_type': 'default'} → " in found["RoPE"]["why"]
    assert "context 64 → 256" in found["RoPE"]["why"]
    assert found["shifted attention (s2)"]["why"].startswith(
        "2 layers, group size 64 of 256 tokens"
    )
    assert found["full attention at the end"]["why"] == "the last 10% of the steps"
    assert found["adapter"]["why"].startswith("longlora → lora: r 8, alpha 16, on q_proj")
    size = (len(tiny_tokenizer) + 5) * 64  # the table, and 5 norms
    assert f"6 modules, {size:,} parameters" in found["trained in addition to LoRA"]["why"]
    assert not found["DeepSpeed, FSDP"]["on"]


def test_switched_off_parts_say_why(tmp_path, recipe):
    path = tmp_path / "doctor.json"
    block = {"shifted_attention": False, "rope": "none", "trainable": []}
    result = run(recipe(longlora=block), "--json", path)
    assert result.exit_code == 0, result.output
    found = {each["what"]: each for each in json.loads(path.read_text())["findings"]}
    for what in ("RoPE", "shifted attention", "trained in addition to LoRA"):
        assert not found[what]["on"]
    assert "rope: none" in found["RoPE"]["why"]


def test_recipe_without_our_keys_is_told_so(recipe):
    result = run(recipe(adapter="lora", lora_r=4, lora_alpha=8, lora_target_linear=True))
    assert result.exit_code == 0, result.output
    assert "neither" in result.output


BAD = {
    "wrong key": ({"longlora": {"group_sise": 8}}, "did you mean 'group_size'"),
    "missing kernel": ({"attn_implementation": "flash_attention_2"}, "does not work here (not"),
    "no GPU for DeepSpeed": ({"deepspeed": "zero2.json"}, "remove deepspeed"),
    "no GPU for kernels": ({"lora_mlp_kernel": True}, "lora_mlp_kernel: false"),
    "no GPU for bf16": ({"bf16": True}, "write bf16: false"),
    "no such base": ({"base_model": "/no/such/folder"}, "base_model: "),
}


@CPU
@pytest.mark.parametrize("case", BAD)
def test_recipe_that_cannot_run_here_is_exit_status_1_and_says_why(recipe, tmp_path, case):
    overrides, expected = BAD[case]
    path = tmp_path / "doctor.json"
    result = run(recipe(**overrides), "--json", path)
    assert result.exit_code == 1
    assert expected in result.output.replace("\n", " ")
    assert json.loads(path.read_text())["runs"] is False


def test_quantized_recipe_is_judged_by_the_trial(recipe, monkeypatch):
    pytest.importorskip("bitsandbytes")

    def broken(bits, device, evaluated):
        raise ValueError("its output or gradient is wrong by 6.7e-01 of the largest value")

    monkeypatch.setattr(trials, "try_bitsandbytes", broken)
    result = run(recipe(load_in_4bit=True))
    assert result.exit_code == 1
    assert "load_in_4bit: true: bitsandbytes 4-bit does not work here" in result.output


def test_file_that_is_no_recipe_is_exit_status_1(tmp_path):
    path = tmp_path / "recipe.yml"
    path.write_text(yaml.safe_dump(["not", "a", "recipe"]))
    result = run(path)
    assert result.exit_code == 1
    assert "is not a recipe" in result.output
    assert "This machine" not in result.output  # told before anything is tried

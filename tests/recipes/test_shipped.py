"""The recipes that are shipped: each is right, planned, and found in a wheel's layout."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import command
import pytest
import yaml
from plan_material import plan_of
from transformers import AutoConfig

from longlora_plugin.recipes import longlora_recipes as shipped
from longlora_plugin.recipes.check import check_recipe
from longlora_plugin.run.recipe import read_recipe

ROOT = Path(__file__).parents[2]
LLAMA = "meta-llama/Llama-2-7b-hf"

# name → (original context, target, RoPE type, its factor, group size, Axolotl's adapter)
EXPECTED = {
    "llama-2-7b-32k": (4096, 32768, "linear", 8, 8192, "longlora"),
    "llama-2-7b-100k": (4096, 102400, "linear", 25, 25600, "longlora"),
    "llama-2-13b-64k": (4096, 65536, "linear", 16, 16384, "longlora"),
    "llama-2-70b-32k-lora": (4096, 32768, "linear", 8, 8192, "longlora"),
    "llama-2-70b-32k-qlora": (4096, 32768, "linear", 8, 8192, "longlora"),
    "llama-3.1-8b-256k": (131072, 262144, "llama3", 32, 65536, "longlora"),
    "llama-3.1-8b-256k-8gpu": (131072, 262144, "llama3", 32, 8192, "longlora"),
    "llama-3.1-8b-1m-8gpu": (131072, 1048576, "llama3", 128, 8192, "longlora"),
    "mistral-7b-128k": (32768, 131072, "yarn", 4, 32768, "longlora"),
    "qwen2.5-7b-128k": (32768, 131072, "yarn", 4, 32768, "longlora"),
    "qwen3-8b-128k": (32768, 131072, "yarn", 4, 32768, "longlora"),
    "smollm2-135m-16k": (8192, 16384, "yarn", 2, 4096, "longlora"),
    "smollm2-135m-cpu": (8192, 16384, "linear", 2, 1024, "longlora"),
    "full-finetune-16k": (4096, 16384, "yarn", 4, 4096, None),
    "qlora-24gb": (4096, 16384, "yarn", 4, 4096, "longlora"),
    "single-gpu-24gb": (8192, 49152, "yarn", 6, 12288, "longlora"),
    "single-gpu-48gb": (131072, 196608, "llama3", 24, 49152, "longlora"),
    "single-gpu-80gb": (131072, 491520, "llama3", 60, 122880, "longlora"),
    "fsdp2-32k": (8192, 32768, "yarn", 4, 8192, "longlora"),
    "sft-longalpaca": (4096, 16384, "linear", 4, 4096, "longlora"),
    "sft-longqa-local": (4096, 16384, "linear", 4, 4096, "longlora"),
    "quickstart-cpu": (256, 2048, "yarn", 8, 512, "longlora"),
    "longqa-quickstart-cpu": (2048, 2048, "yarn", 8, 512, "longlora"),
}


run = partial(command.invoke, "recipes")


def test_every_shipped_recipe_has_an_expectation_here():
    assert set(shipped()) == set(EXPECTED)


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_shipped_recipe_is_right_and_fits_the_gpus_it_names(name, bases, monkeypatch):
    monkeypatch.chdir(ROOT)
    path = shipped()[name]
    base = yaml.safe_load(path.read_text())["base_model"]
    stand_in = None if Path(base).is_dir() else str(bases / base)
    gpu, gpus = _named_gpus(path)
    report = check_recipe(path, gpu=gpu, gpus=gpus, base_config=stand_in)
    assert report.problems == []
    assert not any("may just fit" in note for note in report.notes)
    assert any(f"fits {gpus} × {gpu}" in note for note in report.notes) == (gpu is not None)
    rope = report.resolved["rope_parameters"]
    assert (
        report.resolved["base_context"],
        report.resolved["target_context"],
        rope["rope_type"],
        rope["factor"],
        report.resolved["group_size"],
        report.resolved["adapter"],
    ) == EXPECTED[name]


@pytest.mark.parametrize("name", [name for name in sorted(EXPECTED) if "single-gpu" in name])
def test_single_gpu_recipe_says_what_plan_says(name, bases):
    path = shipped()[name]
    base = yaml.safe_load(path.read_text())["base_model"]
    config = AutoConfig.from_pretrained(bases / base)
    plan = plan_of(read_recipe(path), config, gpu=_named_gpus(path)[0])
    total, host = plan.memory["total"], plan.host_memory
    assert f"plan: {total:.1f} GiB on the GPU and {host:.0f} GiB of CPU" in path.read_text()
    assert plan.fits
    assert not plan.tight


def _named_gpus(path: Path) -> tuple[str | None, int]:
    """The GPUs of the `plan` line at the top of a recipe."""
    found = re.search(r"# .*longlora plan \S+ --gpu (\S+)(?: --gpus (\d+))?", path.read_text())
    return (found[1], int(found[2] or 1)) if found else (None, 1)


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_shipped_recipe_says_what_it_is_and_names_itself(name):
    lines = shipped()[name].read_text().splitlines()
    assert lines[0].startswith("# ")
    assert sum("#" in line for line in lines) >= 8
    named = re.findall(r"examples/configs/([\w.-]+)\.yml", "\n".join(lines))
    assert named
    assert set(named) == {name}


@pytest.mark.parametrize(
    "name", [name for name in sorted(EXPECTED) if name.startswith(("llama-2", "full"))]
)
def test_llama_2_recipes_have_the_papers_hyperparameters(name):
    raw = yaml.safe_load(shipped()[name].read_text())
    assert float(raw["learning_rate"]) == (1e-5 if "70b" in name else 2e-5)
    assert (raw["adam_beta1"], raw["adam_beta2"], raw["weight_decay"]) == (0.9, 0.95, 0.0)
    assert (raw["lr_scheduler"], raw["warmup_steps"]) == ("constant_with_warmup", 20)
    assert raw["micro_batch_size"] * raw["gradient_accumulation_steps"] * 8 == 64
    assert raw["max_steps"] == 1000
    assert not {"lora_r", "lora_alpha", "lora_dropout", "lora_target_modules"} & set(raw)


def test_a_wheels_layout_is_found_and_reading_it_loads_no_torch(tmp_path):
    package = tmp_path / "longlora_plugin"
    shutil.copytree(ROOT / "longlora_plugin", package)
    shutil.copytree(ROOT / "examples" / "configs", package / "recipes" / "configs")
    code = (
        "import sys; from longlora_plugin.recipes import longlora_recipes as shipped; "
        "print(shipped()['qlora-24gb']); assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert done.stdout.strip() == str(package / "recipes" / "configs" / "qlora-24gb.yml")

"""The real `axolotl` command on tiny models: recipes, runs, adapters, merges."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import tiny
import torch
import yaml
from adapters import move_and_save, wrapped
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

SUPPORT = Path(__file__).parent
CONTEXT, TARGET = 64, 256
FACTOR = TARGET // CONTEXT
TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"


def python_path() -> str:
    """PYTHONPATH for a child process: plugins of the tests, then what this process has."""
    return os.pathsep.join(filter(None, (str(SUPPORT), os.environ.get("PYTHONPATH"))))


def run_axolotl(*arguments: object, check: bool = True, **environment: object) -> SimpleNamespace:
    """Run the real command; `.log` is stdout and stderr together."""
    binaries = Path(sys.executable).parent
    command = [str(binaries / "axolotl"), *map(str, arguments)]
    variables = {
        **os.environ,
        **{name: str(value) for name, value in environment.items()},
        "PYTHONPATH": python_path(),
        "OMP_NUM_THREADS": "1",
        "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",  # where `accelerate` is
    }
    done = subprocess.run(
        command,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )
    if check:
        assert done.returncode == 0, done.stdout[-4000:]
    return SimpleNamespace(code=done.returncode, log=done.stdout)


def write_recipe(folder: Path, base: Path, data: Path, **overrides: object) -> Path:
    keys = {
        **tiny.training(data, folder / "prepared"),
        "plugins": ["longlora_plugin.LongLoRAPlugin"],
        "sequence_len": TARGET,
        "max_steps": 8,
        "learning_rate": 2e-5,
        "bf16": False,
        "save_strategy": "no",
        **overrides,
    }
    return tiny.write_recipe(folder / "recipe.yml", base, folder / "out", keys)


def train_in_process(recipe: Path) -> dict[str, torch.Tensor]:
    from axolotl.cli.args import TrainerCliArgs
    from axolotl.cli.config import load_cfg
    from axolotl.cli.train import do_train

    cfg = load_cfg(str(recipe))
    torch.manual_seed(0)  # Axolotl 0.19 does not seed LoRA's initialisation
    do_train(cfg, TrainerCliArgs())
    return load_file(Path(cfg.output_dir) / "adapter_model.safetensors")


def scaled(base: Path):
    """The base's config with the RoPE that the recipe (linear) asks for."""
    config = AutoConfig.from_pretrained(base)
    config.rope_parameters = {
        **config.rope_parameters,
        "rope_type": "linear",
        "factor": float(FACTOR),
    }
    config.max_position_embeddings = TARGET
    return config


def make_adapter(base: Path, folder: Path) -> None:
    """An adapter as a run of this package saves it, every tensor moved."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    move_and_save(wrapped(model), folder)
    scaled(base).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)


def merge_lora(recipe: Path, **options: object) -> Path:
    from axolotl.cli.merge_lora import do_cli

    do_cli(config=str(recipe), **options)
    return Path(yaml.safe_load(recipe.read_text())["output_dir"]) / "merged"

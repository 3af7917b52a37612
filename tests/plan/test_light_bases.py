"""`plan` reads common bases without transformers, and gets the figures that transformers gives."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from plan_material import plan_of, tiny_llama, write_recipe
from transformers import AutoConfig, MistralConfig, Qwen2Config, Qwen3Config

from longlora_plugin.plan.from_recipe import base_config_of, parameters_of
from longlora_plugin.plan.shape import meta_model, shape_of
from longlora_plugin.plan.skeleton import Skeleton
from longlora_plugin.rope import rope_parameters_of
from longlora_plugin.rope.base_config import contexts_of
from longlora_plugin.run.base_model import PlainConfig, plain_config_of
from longlora_plugin.run.prepare import prepare_run
from longlora_plugin.run.recipe import read_recipe

SIZES = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
BASES = {
    "llama": tiny_llama(),
    "llama-tied-biased": tiny_llama(tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "llama-head-dim": tiny_llama(head_dim=32),
    "llama3": tiny_llama(
        max_position_embeddings=131072,
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        },
    ),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen2-yarn": Qwen2Config(**SIZES, rope_parameters={**YARN, "rope_theta": 1e6}),
    "qwen3": Qwen3Config(**SIZES, head_dim=32, attention_bias=True),
}  # fmt: skip


@pytest.mark.parametrize("name", BASES)
def test_light_base_has_the_figures_of_transformers_model(tmp_path: Path, name: str) -> None:
    path = write_recipe(
        tmp_path, BASES[name], adapter="longlora", sequence_len=8 * 131072,
        longlora={"original_context": None},
    )  # fmt: skip
    recipe = read_recipe(path)
    light, full = base_config_of(recipe), AutoConfig.from_pretrained(tmp_path / "base")
    assert isinstance(light, PlainConfig)
    model, stock = meta_model(light), meta_model(full)
    assert isinstance(model, Skeleton)
    weights = {key: tuple(value.shape) for key, value in model.named_parameters()}
    assert weights == {key: tuple(value.shape) for key, value in stock.named_parameters()}
    assert shape_of(model) == shape_of(stock)
    run = prepare_run(recipe.raw, full)
    assert parameters_of(run, model) == parameters_of(run, stock)
    assert rope_parameters_of(light) == rope_parameters_of(full)
    assert contexts_of(light) == contexts_of(full)
    assert plan_of(recipe, light, "a100-80gb") == plan_of(recipe, full, "a100-80gb")


@pytest.mark.parametrize(
    ("config", "keys"),
    [
        (MistralConfig(**SIZES), {}),
        (Qwen2Config(**SIZES, use_sliding_window=True, max_window_layers=1), {}),
        (tiny_llama(), {"trust_remote_code": True}),
        (tiny_llama(), {"model_config": {"num_hidden_layers": 5}}),
        (tiny_llama(), {"overrides_of_model_config": {"tie_word_embeddings": True}}),
    ],
    ids=["window", "windows", "remote-code", "model-config", "its-other-name"],
)
def test_base_that_says_less_or_more_is_left_to_transformers(
    tmp_path: Path, config: Any, keys: dict[str, Any]
) -> None:
    recipe = read_recipe(write_recipe(tmp_path, config, adapter="longlora", **keys))
    assert plain_config_of(recipe.raw) is None


def test_options_of_rope_are_judged_by_transformers(tmp_path: Path) -> None:
    options = {"rope": {"preset": "yarn", "beta_fast": 16}}
    recipe = read_recipe(write_recipe(tmp_path, tiny_llama(), adapter="longlora", longlora=options))
    assert not isinstance(base_config_of(recipe), PlainConfig)


def test_plan_of_a_local_base_imports_neither_torch_nor_transformers(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, tiny_llama(), adapter="longlora", sequence_len=8192)
    code = (
        "import json, sys\nfrom longlora_plugin.cli import longlora\n"
        f"longlora(['plan', {str(path)!r}, '--json', '-'], standalone_mode=False)\n"
        "heavy = {'torch', 'transformers', 'peft', 'axolotl'} & set(sys.modules)\n"
        "print(json.dumps(sorted(heavy)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1]) == []

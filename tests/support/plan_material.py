"""Tiny configs, shapes and recipes that the tests of `plan` share."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import command
from transformers import GemmaConfig, GPTNeoXConfig, LlamaConfig, Qwen2Config

from longlora_plugin.plan.flops import step_flops
from longlora_plugin.plan.gpus import find_gpu
from longlora_plugin.plan.planner import Plan, plan_run, planned_run
from longlora_plugin.plan.shape import ModelShape
from longlora_plugin.run.recipe import Recipe

LLAMA_SAVED = ["embed_tokens", "input_layernorm", "post_attention_layernorm", "norm"]


def tiny_llama(**changes: Any) -> LlamaConfig:
    values = {
        "vocab_size": 500, "hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    }  # fmt: skip
    return LlamaConfig(**{**values, **changes})


CONFIGS = {
    "llama-gqa": tiny_llama(),
    "llama-tied": tiny_llama(num_key_value_heads=4, tie_word_embeddings=True),
    "qwen2": Qwen2Config(
        vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=1,
    ),
    "gemma": GemmaConfig(
        vocab_size=300, hidden_size=48, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32,
    ),
    "gpt-neox": GPTNeoXConfig(
        vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4,
    ),
}  # fmt: skip


def plain_shape(**changes: Any) -> ModelShape:
    values = {
        "hidden": 512, "vocab": 1000, "layers": 4, "heads": 8, "head_dim": 64, "value_dim": 64,
        "rotary_dim": 64, "windows": (None,) * 4, "projection_weights": 4 * 4 * 512**2,
        "ffn_weights": 4 * 3 * 512 * 1376, "head_weights": 512 * 1000, "norm_elements": 9 * 512,
    }  # fmt: skip
    values |= {"kv_heads": changes.get("heads", 8), **changes}
    return ModelShape(**values)


def write_recipe(folder: Path, config: Any, **keys: Any) -> Path:
    config.save_pretrained(folder / "base")
    recipe = folder / "recipe.yml"
    given = {
        "base_model": str(folder / "base"),
        "plugins": ["longlora_plugin.LongLoRAPlugin"],
        **keys,
    }
    recipe.write_text(json.dumps(given), encoding="utf-8")
    return recipe


invoke = partial(command.invoke, "plan")


def plan_of(recipe: Recipe, config: Any, gpu: str | None = None, gpus: int = 1) -> Plan:
    return plan_run(recipe, planned_run(recipe, config, gpus), find_gpu(gpu) if gpu else None)


def speed_up(shape: ModelShape, length: int, group_size: int) -> float:
    """FLOPs of a full-attention step over those of an S² step."""
    return step_flops(shape, length).total / step_flops(shape, length, group_size).total

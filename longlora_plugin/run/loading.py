"""How a recipe's models are loaded outside of training: what Axolotl reads from its keys."""

from __future__ import annotations

import os
from typing import Any

from longlora_plugin.rope import base_context_of
from longlora_plugin.run.axolotl_keys import value_of
from longlora_plugin.run.prepare import PreparedRun, prepare_run
from longlora_plugin.run.recipe import Recipe, asks_for_longlora


def prepared_run(recipe: Recipe, base_config: Any) -> PreparedRun:
    """The recipe's run.

    Raises:
        ValueError: its RoPE cannot be decided.
    """
    run = prepare_run(recipe.raw, base_config)
    if asks_for_longlora(recipe.raw):
        run.resolved_rope()
    return run


def base_context(recipe: Recipe, base_config: Any) -> int:
    """Tokens that the base model handles before the recipe extends it."""
    return prepared_run(recipe, base_config).base_context or base_context_of(base_config)


def is_reward_model(recipe: Recipe) -> bool:
    """Whether a recipe trains a model that scores a text."""
    return bool(recipe.raw.get("reward_model") or recipe.raw.get("process_reward_model"))


def tokenizer_of(recipe: Recipe) -> str:
    """Folder or name of the base model's tokenizer."""
    return str(recipe.raw.get("tokenizer_config") or recipe.base_model)


def choose_dtype(recipe: Recipe, device: Any) -> Any:
    """float32 on a CPU; elsewhere what the recipe trains in, bfloat16 where it leaves it open."""
    import torch

    raw = recipe.raw
    if torch.device(device).type == "cpu":
        return torch.float32
    bf16 = raw.get("bf16", "auto")
    if bf16 in (True, "auto", "full") and not raw.get("fp16"):
        return torch.bfloat16
    return torch.float16 if raw.get("fp16") else torch.float32


def quantization_of(recipe: Recipe) -> dict[str, Any]:
    """How Axolotl quantizes the base of this recipe, as options of `BitsAndBytesConfig`."""
    raw = recipe.raw
    if not raw.get("adapter"):
        return {}
    if raw.get("load_in_4bit"):
        options = {
            "load_in_4bit": True,
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_quant_type": "nf4",
        }
        return options | (raw.get("bnb_config_kwargs") or {})
    return {"load_in_8bit": True} if raw.get("load_in_8bit") else {}


def load_options_of(recipe: Recipe, device_map: str | None) -> dict[str, Any]:
    """Options of `from_pretrained`.

    Args:
        device_map: instead of the recipe's.
    """
    import torch

    raw, options = recipe.raw, dict[str, Any]()
    if raw.get("trust_remote_code") is True:
        options["trust_remote_code"] = True
    if revision := value_of(raw, "revision_of_model"):
        options["revision"] = revision
    several = torch.cuda.device_count() > 1 and int(os.environ.get("WORLD_SIZE", "1")) == 1
    if device_map := device_map or raw.get("device_map") or ("auto" if several else None):
        options["device_map"] = device_map
    return options

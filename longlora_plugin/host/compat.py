"""The one room beside `plugin.py` that imports Axolotl: what differs between its versions.

Axolotl 0.19 to 0.21.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click
from axolotl.integrations import base as integrations
from axolotl.integrations.base import BasePlugin
from axolotl.utils.logging import get_logger

__all__ = [
    "LOADS_INSTALLED_PLUGINS",
    "BasePlugin",
    "RecipeError",
    "after_merge",
    "is_duplicate_instance",
    "keys_for_merge",
    "log",
    "merges_base_stored_as",
    "save_fsdp2_adapters_with",
    "uses_deepspeed",
    "uses_fsdp",
]

# Axolotl shows INFO for loggers of its own name only.
log = get_logger("axolotl.longlora_plugin")

HAS_MERGE_HOOK = hasattr(BasePlugin, "post_lora_merge")
"""Axolotl 0.21 calls `post_lora_merge`; 0.19 calls nothing after a merge."""


LOADS_INSTALLED_PLUGINS = hasattr(integrations, "get_builtin_plugins")
"""Axolotl 0.21 loads plugins by their entry points; before, a recipe's `plugins:` line does."""


class RecipeError(ValueError, click.ClickException):
    """A recipe that cannot run. The command line shows the message without a traceback."""

    def __init__(self, message: str) -> None:
        click.ClickException.__init__(self, message)


def is_duplicate_instance(plugin: BasePlugin) -> bool:
    """Whether Axolotl loaded this plugin twice, and this is not the first.

    Axolotl 0.21 loads it by its entry point and, where the recipe's `plugins:` line spells the
    name in another way, once more; both then get every hook.
    """
    from axolotl.integrations.base import PluginManager

    same = [each for each in PluginManager().plugins.values() if type(each) is type(plugin)]
    return any(each is plugin for each in same) and same[0] is not plugin


def after_merge(finish: Callable[[Any, Path, Path], None]) -> None:
    """Have `finish(cfg, adapter_dir, merged_dir)` called after `axolotl merge-lora`, once.

    Only where Axolotl has no hook for it (0.19): there its merge function is wrapped.
    """
    if HAS_MERGE_HOOK:
        return
    from axolotl.cli import merge_lora

    stock = merge_lora.do_merge_lora
    if hasattr(stock, "_longlora_stock"):
        stock = stock._longlora_stock

    @functools.wraps(stock)
    def do_merge_lora(*, cfg: Any) -> None:
        stock(cfg=cfg)
        finish(cfg, Path(cfg.lora_model_dir), Path(cfg.output_dir) / "merged")

    do_merge_lora._longlora_stock = stock  # type: ignore[attr-defined]
    merge_lora.do_merge_lora = do_merge_lora


def merges_base_stored_as(quantization: str | None, merge_method: str | None) -> bool:
    """Whether `axolotl merge-lora` has code for a base whose weights are stored so."""
    if merge_method == "legacy":
        return False
    return quantization in ("fp8", "mxfp4") or (
        HAS_MERGE_HOOK and quantization == "bitsandbytes 4-bit"
    )


def keys_for_merge(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Keys that make `axolotl merge-lora` round a 4-bit run's base as training did.

    Training double-quantizes unless told otherwise; 0.19's merge then takes the key for false.
    """
    if HAS_MERGE_HOOK:
        return {}
    own = dict(recipe.get("bnb_config_kwargs") or {})
    return {"bnb_config_kwargs": {"bnb_4bit_use_double_quant": True, **own}}


def uses_deepspeed(cfg: Mapping[str, Any]) -> bool:
    """Whether the run trains under DeepSpeed, by its recipe or by how it was launched."""
    launched = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    return bool(cfg.get("deepspeed")) or launched


def uses_fsdp(cfg: Mapping[str, Any]) -> bool:
    """Whether the run trains under FSDP, by its recipe or by how it was launched."""
    launched = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    return bool(cfg.get("fsdp_config") or cfg.get("fsdp")) or launched


def save_fsdp2_adapters_with(write: Callable[[Any, Path], None]) -> Callable[[], None]:
    """Have `write(model, folder)` save the adapter at the end of an FSDP2 run.

    Axolotl's own function knows LoRA tensors only, and raises
    KeyError 'modules_to_save.default.weight' where anything else is trained.

    Returns:
        Function that puts Axolotl's own back.
    """
    from axolotl.integrations.expert_parallel import shard

    stock = shard.save_fsdp2_lora_adapter

    @functools.wraps(stock)
    def save_fsdp2_lora_adapter(model: Any, output_dir: str) -> bool:
        write(model, Path(output_dir))
        return True

    shard.save_fsdp2_lora_adapter = save_fsdp2_lora_adapter

    def restore() -> None:
        shard.save_fsdp2_lora_adapter = stock

    return restore

"""What differs between Axolotl's versions, and what of it this package replaces.

Axolotl 0.19 to 0.21.
"""

from __future__ import annotations

import functools
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from axolotl.integrations import base as integrations
from axolotl.integrations.base import BasePlugin
from axolotl.utils.logging import get_logger

# Axolotl shows INFO for loggers of its own name only.
log = get_logger("axolotl.longlora_plugin")

MERGE_COMMAND = "axolotl.cli.merge_lora"

HAS_MERGE_HOOK = hasattr(BasePlugin, "post_lora_merge")
"""Axolotl 0.21 calls `post_lora_merge`; 0.19 calls nothing after a merge."""


LOADS_INSTALLED_PLUGINS = hasattr(integrations, "get_builtin_plugins")
"""Axolotl 0.21 loads plugins by their entry points; before, a recipe's `plugins:` line does."""


class RecipeError(ValueError, click.ClickException):
    """A recipe that cannot run. The command line shows the message without a traceback."""

    def __init__(self, message: str) -> None:
        click.ClickException.__init__(self, message)


@contextmanager
def recipe_errors(prefix: str = "") -> Iterator[None]:
    """Make what a user can fix an error that the command line shows without a traceback."""
    try:
        yield
    except ValueError as error:
        raise RecipeError(f"{prefix}{error}") from error
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise RecipeError(f"{prefix}{where}{error.strerror or error}") from error


def is_duplicate_instance(plugin: BasePlugin) -> bool:
    """Whether Axolotl loaded this plugin twice, and this is not the first.

    Axolotl 0.21 loads it by its entry point and, where the recipe's `plugins:` line spells the
    name in another way, once more; both then get every hook.
    """
    from axolotl.integrations.base import PluginManager

    same = [each for each in PluginManager().plugins.values() if type(each) is type(plugin)]
    return any(each is plugin for each in same) and same[0] is not plugin


def is_merging(cfg: Mapping[str, Any]) -> bool:
    """Whether a recipe is loaded to merge its adapter.

    `axolotl merge-lora` loads it twice, and says so the second time only.
    """
    frame = sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__") != MERGE_COMMAND:
        frame = frame.f_back
    return bool(cfg.get("merge_lora")) or frame.f_globals.get("__name__") == MERGE_COMMAND


def merge_with(merge: Callable[[Any, Callable[[Path], None]], Path | None]) -> None:
    """Have `axolotl merge-lora` call `merge(cfg, weights)`.

    `weights(folder)` lets Axolotl write its own merged model to a folder. Where `merge` returns
    None, the recipe is not this package's, and Axolotl's function runs as it is.
    """
    from axolotl.cli import merge_lora
    from axolotl.integrations.base import PluginManager
    from axolotl.loaders.adapter import _patch_peft_clippable_linear

    original = getattr(merge_lora.do_merge_lora, "_longlora_original", merge_lora.do_merge_lora)

    @functools.wraps(original)
    def do_merge_lora(*, cfg: Any) -> None:
        def weights(folder: Path) -> None:
            own = cfg.output_dir
            cfg.output_dir = str(folder / "axolotl")
            try:
                original(cfg=cfg)
            finally:
                cfg.output_dir = own
            for path in (folder / "axolotl" / "merged").iterdir():
                path.rename(folder / path.name)
            shutil.rmtree(folder / "axolotl")

        # Gemma 4's clipped linear layers, which PEFT alone does not know.
        _patch_peft_clippable_linear()
        merged = merge(cfg, weights)
        if merged is None:
            original(cfg=cfg)
        elif HAS_MERGE_HOOK:
            PluginManager.get_instance().post_lora_merge(cfg, str(cfg.lora_model_dir), str(merged))

    do_merge_lora._longlora_original = original  # type: ignore[attr-defined]
    merge_lora.do_merge_lora = do_merge_lora


def quantization_of_run(cfg: Any) -> dict[str, Any] | None:
    """Keywords of the BitsAndBytesConfig that a recipe's run trained with; None for 16 bits.

    In addition: `linear`, whether linear layers were quantized, and `quantize_moe_experts`.
    """
    four_bit = cfg._original_load_in_4bit or "qlora" in (cfg.adapter, cfg._original_adapter)
    experts = bool(cfg._original_quantize_moe_experts or cfg.quantize_moe_experts)
    if not four_bit and not experts:
        return None
    settings = dict(cfg.bnb_config_kwargs or {})
    if HAS_MERGE_HOOK:
        from axolotl.utils.nf4 import bnb_4bit_skip_modules

        skipped = bnb_4bit_skip_modules(cfg.model_config_type)
    else:
        skipped = ["out_proj"] if cfg.model_config_type == "falcon_h1" else None
    settings.setdefault("llm_int8_skip_modules", skipped or None)
    return {**settings, "linear": bool(four_bit), "quantize_moe_experts": experts}


def quantizes_as_only_axolotl_can(cfg: Any) -> bool:
    """Whether the run used Axolotl's own 4-bit back end (0.21: `nf4_backend: torchao`, staged)."""
    return bool(cfg._original_staged_nf4) or "torchao" in (
        cfg._original_nf4_backend,
        cfg.nf4_backend,
    )


def merges_base_stored_as(quantization: str | None, merge_method: str | None) -> bool:
    """Whether `axolotl merge-lora` has code for a base whose weights are stored so."""
    if merge_method == "legacy":
        return False
    return quantization in ("fp8", "mxfp4") or (
        HAS_MERGE_HOOK and quantization == "bitsandbytes 4-bit"
    )


def is_main_process() -> bool:
    """Whether this is the only process of a run, or the first of several.

    Also when the run has ended: Axolotl's own function needs the process group, which is gone then.
    """
    return int(os.environ.get("RANK", "0")) == 0


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

    original = shard.save_fsdp2_lora_adapter

    @functools.wraps(original)
    def save_fsdp2_lora_adapter(model: Any, output_dir: str) -> bool:
        write(model, Path(output_dir))
        return True

    shard.save_fsdp2_lora_adapter = save_fsdp2_lora_adapter
    return functools.partial(setattr, shard, "save_fsdp2_lora_adapter", original)

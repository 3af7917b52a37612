"""What is wrong with a recipe: every check on its own, so that one report holds all of it."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from longlora_plugin.args import LongLoRAConfig
from longlora_plugin.attention.vocabulary import kernel_kind
from longlora_plugin.checkpoints.files import is_adapter
from longlora_plugin.registry import find
from longlora_plugin.rope import RopeSettings
from longlora_plugin.run.axolotl_keys import (
    ROPE_KEYS,
    attention_implementation,
    deepspeed_settings,
    model_config_of,
    value_of,
)
from longlora_plugin.run.base_model import PlainConfig
from longlora_plugin.run.context_parallel import spellings_of
from longlora_plugin.run.refusals import refused

TRL_ATTACHES_ADAPTER = ("dpo", "ipo", "kto")
"""Values of `rl` for which Axolotl hands the trainer a LoRA config instead of a PEFT model."""


@contextmanager
def told_in(problems: list[str]) -> Iterator[None]:
    """What a ValueError of the block says is one of the problems; the rest goes on."""
    try:
        yield
    except ValueError as error:
        problems.append(str(error))


def problems_of(
    recipe: Mapping[str, Any], block: LongLoRAConfig, base_config: Any, sequence_len: int
) -> Iterator[str]:
    """Everything that is wrong with a recipe except how its RoPE resolves.

    Args:
        base_config: None where the base model's config cannot be read; what needs it is left out.
    """
    yield from refused(recipe, block)
    checks: list[Callable[[], Any]] = []
    if block.shifted_attention:
        checks += [
            partial(block.group_size_for, sequence_len),
            lambda: kernel_kind(attention_implementation(recipe)),
            partial(_check_pattern, recipe, block),
        ]
        if base_config is not None:
            checks.append(partial(_check_family, recipe, base_config))
    checks += [partial(find, "longlora_trainable_modules", kind) for kind in block.trainable]
    if base_config is None:
        checks.append(partial(find, "longlora_rope_presets", block.rope_preset))
    if recipe.get("adapter") == "longlora":
        checks.append(partial(_check_zero3, recipe))
    checks += [
        partial(check, recipe) for check in (_check_lm_eval, _check_tiled_mlp, _check_preference)
    ]
    for check in checks:
        try:
            check()
        except ValueError as error:
            yield str(error)


def _check_pattern(recipe: Mapping[str, Any], block: LongLoRAConfig) -> None:
    pattern = find("longlora_attention_patterns", block.attention_pattern)
    if not pattern.skips_positions:
        return
    shared = {key: size for key, size in spellings_of(recipe).items() if str(size) != "1"}
    for key, value in {"rl": recipe.get("rl"), **shared}.items():
        if value:
            raise ValueError(
                f"{key}: {value} does not work with longlora: {{attention_pattern: "
                f"{pattern.name}}}, whose positions are drawn anew for each pass over whole rows; "
                "write attention_pattern: s2"
            )


def check_rope_is_ours(
    recipe: Mapping[str, Any], block: LongLoRAConfig, settings: RopeSettings | None
) -> None:
    """Raise ValueError where another key of the recipe would decide RoPE as well."""
    own = model_config_of(recipe)
    if block.rope_preset == "none":
        return
    ours = {*ROPE_KEYS, *(settings.config_fields if settings else ())}
    theirs = ", ".join(f"model_config.{key}: {own[key]}" for key in own if key in ours)
    if theirs:
        raise ValueError(
            f"two answers to how RoPE is scaled: longlora.rope: {block.rope_preset} and {theirs}; "
            "keep one: remove the model_config keys, or write longlora: {rope: none}"
        )
    keywords = value_of(recipe, "overrides_of_model_kwargs") or {}
    instead = sorted({"config", *ours} & set(keywords))
    if instead:
        raise ValueError(
            f"model_kwargs.{instead[0]}: {keywords[instead[0]]} would build the model without "
            f"longlora.rope: {block.rope_preset}; remove it, or write longlora: {{rope: none}}"
        )


def check_rope_can_be_written(
    recipe: Mapping[str, Any], base_config: Any, settings: RopeSettings
) -> None:
    """Raise ValueError where Axolotl has no key for the RoPE of this kind of model."""
    if settings.extended and base_config.get_text_config() is not base_config:
        raise ValueError(
            f"{recipe.get('base_model')} is a multimodal model ({base_config.model_type}); RoPE of "
            "its text decoder cannot be set through Axolotl's model_config. Write "
            "longlora: {rope: none}, or use the text-only model"
        )


def _check_zero3(recipe: Mapping[str, Any]) -> None:
    path, settings = recipe.get("deepspeed"), deepspeed_settings(recipe)
    zero, bf16 = settings.get("zero_optimization"), settings.get("bf16")
    if not isinstance(zero, Mapping) or zero.get("stage") != 3:
        return
    if isinstance(bf16, Mapping) and bf16.get("enabled") == "auto" and recipe.get("bf16"):
        raise ValueError(
            f'deepspeed: {path} has "bf16": {{"enabled": "auto"}}; under ZeRO-3 Axolotl loads the '
            "model before DeepSpeed learns what auto means, and gets it in fp32. Write "
            '"enabled": true, as in examples/configs/deepspeed/zero3.json'
        )


def _check_lm_eval(recipe: Mapping[str, Any]) -> None:
    """Axolotl's lm-eval loads the output folder by name, without its adapter's RoPE."""
    if not recipe.get("lm_eval_tasks"):
        return
    named = recipe.get("lm_eval_model")
    # A merged or another whole model has its RoPE in its own config.
    if not recipe.get("adapter") or (named and not is_adapter(Path(str(named)))):
        return
    tasks = recipe["lm_eval_tasks"]
    names = [tasks] if isinstance(tasks, str) else [str(task).split(":")[0] for task in tasks]
    raise ValueError(
        "lm_eval_tasks: Axolotl hands the adapter's folder to lm-eval, which scores it with the "
        "base model's RoPE or not at all. Remove lm_eval_tasks and, after training, run "
        f"longlora bench RECIPE --tasks {','.join(names)}; or merge first, and write "
        "lm_eval_model: <output_dir>/merged with lm_eval_post_train: false"
    )


def _check_tiled_mlp(recipe: Mapping[str, Any]) -> None:
    rows = str(recipe.get("micro_batch_size") or 1)
    if recipe.get("tiled_mlp") and recipe.get("fsdp_config"):
        raise ValueError(
            "tiled_mlp: true with fsdp_config: in the backward pass Axolotl frees weights of a "
            "layer that still needs them, and the processes crash. Write deepspeed: …/zero3.json "
            "instead of fsdp_config, or remove tiled_mlp"
        )
    if not recipe.get("tiled_mlp") or rows == "1" or recipe.get("sample_packing"):
        return
    raise ValueError(
        f"tiled_mlp: true with micro_batch_size: {rows}: Axolotl takes the rows of a batch for one "
        "row there, and the gradients are wrong. Write micro_batch_size: 1 with "
        f"gradient_accumulation_steps: {rows}, or sample_packing: true"
    )


def _check_preference(recipe: Mapping[str, Any]) -> None:
    method, started_from = recipe.get("rl"), recipe.get("lora_model_dir")
    if method in TRL_ATTACHES_ADAPTER and recipe.get("adapter") and started_from:
        raise ValueError(
            f"rl: {method} with lora_model_dir: {started_from}: Axolotl does not read it there and "
            "trains a new adapter. Merge it first (axolotl merge-lora), and write the merged "
            "folder as base_model, which is then the reference as well"
        )


def _check_family(recipe: Mapping[str, Any], base_config: Any) -> None:
    if recipe.get("trust_remote_code"):
        return  # the model's file is not transformers'; the built model is checked
    if not uses_attention_interface(base_config):
        raise ValueError(
            f"shifted attention does not support {recipe.get('base_model')} "
            f"({base_config.model_type}): its attention does not go through transformers' "
            "attention interface; write longlora: {shifted_attention: false}"
        )


def uses_attention_interface(base_config: Any) -> bool:
    """Whether the family's modelling file calls attention through transformers' registry."""
    if isinstance(base_config, PlainConfig):
        return True
    from transformers import AutoModelForCausalLM

    try:
        model_class = AutoModelForCausalLM._model_mapping[type(base_config)]
    except KeyError:
        return True  # not a plain causal language model; the built model is checked
    if isinstance(model_class, tuple):
        model_class = model_class[0]
    module = sys.modules[model_class.__module__]
    return "ALL_ATTENTION_FUNCTIONS" in inspect.getsource(module)

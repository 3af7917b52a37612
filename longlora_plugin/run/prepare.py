"""From a LongLoRA recipe to one that Axolotl understands by itself.

Axolotl builds quantized bases, gradient checkpointing, kernels, FSDP and merging for adapters
named `lora` and `qlora` only, and RoPE must be in the config before the model is built. So the
recipe is rewritten before Axolotl validates it: the adapter gets a name that Axolotl knows, RoPE
goes into `model_config`, and what was decided is recorded under `longlora.resolved`.

Everything that can be wrong is found here, before anything is loaded or written.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from longlora_plugin.args import LongLoRAConfig, Resolved, parse_block
from longlora_plugin.checkpoints.resume import choose_checkpoint
from longlora_plugin.registry import find
from longlora_plugin.rope import RopeSettings, resolve_rope, rope_parameters_of
from longlora_plugin.run.recipe import AXOLOTL_SEQUENCE_LEN

LORA_DEFAULTS = {"lora_r": 8, "lora_alpha": 16, "lora_dropout": 0.0}
"""The paper's (section 4.1), each used where the recipe sets nothing."""
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
TARGET_KEYS = ("lora_target_modules", "lora_target_linear", "lora_target_parameters")
MODEL_CONFIG_KEYS = ("model_config", "overrides_of_model_config")
ROPE_KEYS = ("rope_parameters", "rope_scaling", "rope_theta", "max_position_embeddings")
LEGACY_ATTENTION_FLAGS = {
    "flash_attention": "flash_attention_2",
    "sdp_attention": "sdpa",
    "flex_attention": "flex_attention",
    "eager_attention": "eager",
    "xformers_attention": "xformers",
    "sage_attention": "sage",
}
ATTENTION_ALIASES = {"flash": "flash_attention_2", "flex": "flex_attention", "sdp": "sdpa"}


def asks_for_longlora(recipe: Mapping[str, Any]) -> bool:
    """Whether a raw recipe wants this plugin to do anything."""
    return recipe.get("adapter") == "longlora" or "longlora" in recipe


def lower(recipe: Mapping[str, Any], base_config: Any) -> tuple[dict[str, Any], list[str]]:
    """Decide everything about one run.

    Args:
        recipe: the raw recipe, as YAML gives it; not changed.
        base_config: transformers config of the base model; not changed.

    Returns:
        The keys to write into the recipe, and warnings.

    Raises:
        ValueError: says everything in the recipe that is wrong or contradicts itself.
    """
    block = parse_block(recipe.get("longlora"))
    if block.resolved is not None:
        return {}, []
    wrong = problems(recipe, block, base_config)
    if wrong:
        raise ValueError("\n".join(wrong))
    adapter = recipe.get("adapter")
    sequence_len = int(recipe.get("sequence_len") or AXOLOTL_SEQUENCE_LEN)
    warnings: list[str] = []

    group_size = block.group_size_for(sequence_len) if block.shifted_attention else None
    settings = _rope(block, base_config, sequence_len)
    if block.rope_preset != "none" and not settings.extended:
        warnings.append(
            f"sequence_len {sequence_len} is not above the {settings.base_context} tokens "
            f"that {recipe.get('base_model')} already handles: RoPE stays as it is, nothing is "
            "extended" + (" (S²-Attn still runs)" if group_size else "")
        )
    resolved = Resolved(
        adapter=adapter,
        group_size=group_size,
        pretrained_context=settings.pretrained_context,
        base_context=settings.base_context,
        target_context=sequence_len,
        rope_before=rope_parameters_of(base_config),
        rope_after=settings.rope_parameters,
        config_fields=settings.config_fields if settings.extended else {},
    )
    resumed, skipped = choose_checkpoint(recipe)
    warnings += skipped
    updates: dict[str, Any] = {
        **resumed,
        "longlora": {**block.model_dump(exclude_none=True), "resolved": resolved.model_dump()},
    }
    if resolved.config_fields:
        updates.update(_model_config(recipe, base_config, settings))
    if adapter == "longlora":
        updates.update(adapter_keys(recipe))
        if recipe.get("loraplus_lr_ratio") and block.trainable:
            warnings.append(
                "loraplus_lr_ratio counts norms to its fast group (every one-dimensional tensor): "
                f"they train at {recipe['loraplus_lr_ratio']} × learning_rate, embeddings at "
                "learning_rate, and embedding_lr is not read"
            )
    if adapter:
        sharded = _sharded_fsdp_checkpoints(recipe)
        if sharded:
            updates.update(sharded)
            warnings.append(
                "FSDP checkpoints are written with state_dict_type: SHARDED_STATE_DICT: those of "
                "FULL_STATE_DICT keep only the first process's part of an adapter, so no run can "
                "go on from them. The saved adapter is whole either way"
            )
    return updates, warnings


def problems(recipe: Mapping[str, Any], block: LongLoRAConfig, base_config: Any) -> list[str]:
    """Everything about LongLoRA that is wrong with a recipe; none of it depends on the others.

    Args:
        base_config: None where the base model's config cannot be read; what needs it is left out.
    """
    given = recipe.get("sequence_len") or AXOLOTL_SEQUENCE_LEN
    try:
        sequence_len = int(given)
    except (TypeError, ValueError):
        return [f"sequence_len: got {given!r}; write a whole number of tokens, such as 32768"]
    checks: list[Callable[[], Any]] = []
    if block.shifted_attention:
        checks += [
            partial(block.group_size_for, sequence_len),
            partial(_check_attention, recipe),
            partial(
                find,
                "longlora_attention_patterns",
                block.attention_pattern,
                what="attention pattern",
            ),
        ]
        if base_config is not None:
            checks.append(partial(_check_family, recipe, base_config))
    checks += [
        partial(find, "longlora_trainable_modules", kind, what="kind of trainable modules")
        for kind in block.trainable
    ]
    checks.append(partial(_check_one_rope, recipe, block))
    if base_config is None:
        checks.append(partial(find, "longlora_rope_presets", block.rope_preset, what="RoPE preset"))
    else:
        checks.append(partial(_check_rope, recipe, block, base_config, sequence_len))
    if recipe.get("adapter") == "longlora":
        checks.append(partial(_check_zero3, recipe))
    return [message for message in map(_message, checks) if message]


def _message(check: Callable[[], Any]) -> str | None:
    try:
        check()
    except ValueError as error:
        return str(error)
    return None


def _check_zero3(recipe: Mapping[str, Any]) -> None:
    path = recipe.get("deepspeed")
    if not path or not Path(str(path)).is_file():
        return  # given in another way, or Axolotl's to report
    try:
        settings = json.loads(Path(str(path)).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"deepspeed: {path} is not valid JSON: {error}") from None
    if (settings.get("zero_optimization") or {}).get("stage") != 3:
        return
    if (settings.get("bf16") or {}).get("enabled") == "auto" and recipe.get("bf16"):
        raise ValueError(
            f'deepspeed: {path} has "bf16": {{"enabled": "auto"}}; under ZeRO-3 Axolotl loads the '
            "model before DeepSpeed learns what auto means, and gets it in fp32. Write "
            '"enabled": true, as in examples/configs/deepspeed/zero3.json'
        )


def _sharded_fsdp_checkpoints(recipe: Mapping[str, Any]) -> dict[str, Any]:
    section = recipe.get("fsdp_config") or {}
    version = section.get("fsdp_version") or section.get("version") or recipe.get("fsdp_version")
    kind = section.get("state_dict_type")
    if not section or str(version) != "2" or kind == "SHARDED_STATE_DICT":
        return {}
    return {"fsdp_config": {**section, "state_dict_type": "SHARDED_STATE_DICT"}}


def adapter_keys(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """What `adapter: longlora` means in keys that Axolotl knows."""
    updates: dict[str, Any] = {"adapter": "qlora" if recipe.get("load_in_4bit") else "lora"}
    updates.update({key: value for key, value in LORA_DEFAULTS.items() if recipe.get(key) is None})
    if not any(recipe.get(key) for key in TARGET_KEYS):
        updates["lora_target_modules"] = list(LORA_TARGETS)
    return updates


def _check_one_rope(recipe: Mapping[str, Any], block: LongLoRAConfig) -> None:
    own = {
        f"{section}.{key}": value
        for section in MODEL_CONFIG_KEYS
        for key, value in (recipe.get(section) or {}).items()
        if key in ROPE_KEYS
    }
    if own and block.rope_preset != "none":
        theirs = ", ".join(f"{key}: {value}" for key, value in own.items())
        raise ValueError(
            f"two answers to how RoPE is scaled: longlora.rope: {block.rope_preset} and {theirs}; "
            "keep one: remove the model_config keys, or write longlora: {rope: none}"
        )


def _check_rope(
    recipe: Mapping[str, Any], block: LongLoRAConfig, base_config: Any, sequence_len: int
) -> None:
    settings = _rope(block, base_config, sequence_len)
    if settings.extended:
        _model_config(recipe, base_config, settings)


def _rope(block: LongLoRAConfig, base_config: Any, sequence_len: int) -> RopeSettings:
    return resolve_rope(
        block.rope_preset,
        base_config,
        sequence_len,
        original_context=block.original_context,
        **block.rope_options,
    )


def _model_config(
    recipe: Mapping[str, Any], base_config: Any, settings: RopeSettings
) -> dict[str, Any]:
    section = next((key for key in MODEL_CONFIG_KEYS if recipe.get(key)), MODEL_CONFIG_KEYS[0])
    text_config = base_config.get_text_config()
    if text_config is not base_config:
        raise ValueError(
            f"{recipe.get('base_model')} is a multimodal model ({base_config.model_type}); RoPE of "
            "its text decoder cannot be set through Axolotl's model_config. Write "
            "longlora: {rope: none}, or use the text-only model"
        )
    return {section: {**(recipe.get(section) or {}), **settings.config_fields}}


def attention_implementation(recipe: Mapping[str, Any]) -> str:
    """The name in transformers of the attention a raw recipe asks for; its default is sdpa."""
    name = recipe.get("attn_implementation")
    if name is None:
        name = next(
            (full for flag, full in LEGACY_ATTENTION_FLAGS.items() if recipe.get(flag)), "sdpa"
        )
    return ATTENTION_ALIASES.get(name, name)


def _check_attention(recipe: Mapping[str, Any]) -> None:
    from longlora_plugin.attention.backends import backend_for

    backend_for(attention_implementation(recipe))
    if (recipe.get("context_parallel_size") or 1) > 1:
        raise ValueError(
            "shifted attention does not work with context_parallel_size: "
            f"{recipe['context_parallel_size']}, which gives each GPU a part of the row; remove "
            "it, or write longlora: {shifted_attention: false}"
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
    from transformers import AutoModelForCausalLM

    try:
        model_class = AutoModelForCausalLM._model_mapping[type(base_config)]
    except KeyError:
        return True  # not a plain causal language model; the built model is checked
    if isinstance(model_class, tuple):
        model_class = model_class[0]
    module = sys.modules[model_class.__module__]
    return "ALL_ATTENTION_FUNCTIONS" in inspect.getsource(module)

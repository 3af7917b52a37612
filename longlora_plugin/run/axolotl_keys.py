"""What a LongLoRA recipe says in keys that Axolotl knows, and how Axolotl reads its own.

Axolotl builds quantized bases, gradient checkpointing, kernels, FSDP and merging for adapters
named `lora` and `qlora` only, and RoPE must be in the config before the model is built.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longlora_plugin.checkpoints.files import read_json

LORA_DEFAULTS = {"lora_r": 8, "lora_alpha": 16, "lora_dropout": 0.0}
"""The paper's (section 4.1), each used where the recipe sets nothing."""
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
TARGET_KEYS = ("lora_target_modules", "lora_target_linear", "lora_target_parameters")
ALIASES = {
    "overrides_of_model_config": "model_config",
    "overrides_of_model_kwargs": "model_kwargs",
    "revision_of_model": "model_revision",
}
"""Axolotl's names for three keys → the alias that wins, even empty, where a recipe has both."""
ROPE_KEYS = (
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "max_position_embeddings",
    "original_max_position_embeddings",
)
"""Keys of a model's config that decide how RoPE is scaled."""
LEGACY_ATTENTION_FLAGS = {
    "flash_attention": "flash_attention_2",
    "sdp_attention": "sdpa",
    "flex_attention": "flex_attention",
    "eager_attention": "eager",
    "xformers_attention": "xformers",
    "sage_attention": "sage",
}
ATTENTION_ALIASES = {"flash": "flash_attention_2", "flex": "flex_attention", "sdp": "sdpa"}


def value_of(recipe: Mapping[str, Any], name: str) -> Any:
    """A key's value as Axolotl reads it from a raw recipe that may spell it in two ways."""
    alias = ALIASES[name]
    return recipe.get(alias) if alias in recipe else recipe.get(name)


def model_config_of(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe's own overrides of the base model's config, under either name.

    Raises:
        ValueError: they are no block of keys, or are given under both names.
    """
    sections = {name: recipe.get(name) for name in ("model_config", "overrides_of_model_config")}
    given = {name: value for name, value in sections.items() if value}
    for name, value in given.items():
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise ValueError(
                f"{name}: got {value!r}; write a block of keys, for example\n"
                f"{name}:\n  sliding_window: null"
            )
    if len(given) > 1:
        raise ValueError(
            "model_config and overrides_of_model_config are two names of one section, of which "
            "Axolotl reads only model_config; move everything there"
        )
    return dict(next(iter(given.values()), {}))


def model_config_keys(recipe: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that add `fields` to the recipe's own overrides, in every section it has."""
    merged = {**model_config_of(recipe), **fields}
    other = "overrides_of_model_config"
    return {"model_config": merged, **({other: dict(merged)} if other in recipe else {})}


def adapter_keys(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """What `adapter: longlora` means in keys that Axolotl knows."""
    updates: dict[str, Any] = {"adapter": "qlora" if recipe.get("load_in_4bit") else "lora"}
    updates.update({key: value for key, value in LORA_DEFAULTS.items() if recipe.get(key) is None})
    if not any(recipe.get(key) for key in TARGET_KEYS):
        updates["lora_target_modules"] = list(LORA_TARGETS)
    return updates


def resumable_fsdp(recipe: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The keys that make FSDP2 write checkpoints from which an adapter's run can go on.

    Returns:
        The keys for Axolotl, and a line for each change of the recipe's own.
    """
    section = dict(recipe.get("fsdp_config") or {})
    version = section.get("fsdp_version") or section.get("version") or recipe.get("fsdp_version")
    if not section or str(version) != "2":
        return {}, []
    keys: dict[str, Any] = {}
    changes = []
    if section.get("state_dict_type") != "SHARDED_STATE_DICT":
        section["state_dict_type"] = "SHARDED_STATE_DICT"
        changes.append(
            "FSDP checkpoints are written with state_dict_type: SHARDED_STATE_DICT: those of "
            "FULL_STATE_DICT keep only the first process's part of an adapter, so no run can "
            "go on from them. The saved adapter is whole either way"
        )
    if section.get("activation_checkpointing") and recipe.get("adapter") == "longlora":
        section["activation_checkpointing"] = False
        keys["gradient_checkpointing"] = recipe.get("gradient_checkpointing") or True
        changes.append(
            "fsdp_config.activation_checkpointing: true becomes gradient_checkpointing: true, "
            "which recomputes the same: with the former FSDP2 saves no optimizer states when "
            "norms are trained, so no run can go on from its checkpoints"
        )
    return ({"fsdp_config": section, **keys}, changes) if changes else ({}, [])


def attention_implementation(recipe: Mapping[str, Any]) -> str:
    """The name in transformers of the attention a raw recipe asks for; its default is sdpa."""
    name = recipe.get("attn_implementation")
    if name is None:
        name = next(
            (full for flag, full in LEGACY_ATTENTION_FLAGS.items() if recipe.get(flag)), "sdpa"
        )
    return ATTENTION_ALIASES.get(name, name)


def deepspeed_settings(recipe: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the file that `deepspeed` names says; nothing where it names none: Axolotl reports it.

    Raises:
        ValueError: the file cannot be read.
    """
    path = Path(str(recipe.get("deepspeed") or ""))
    if not path.is_file():
        return {}
    try:
        return read_json(path)
    except ValueError as error:
        raise ValueError(f"deepspeed: {error}") from None

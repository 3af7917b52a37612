"""The config of the model that was trained: the base's, with everything the run had set.

The run saved its config in the adapter's folder. That, not the recipe as it reads today, says what
was trained: the recipe may have changed since, or had keys overridden on the command line.
"""

from __future__ import annotations

import copy
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

from longlora_plugin.checkpoints.files import read_json
from longlora_plugin.rope.base_config import rope_parameters_of, text_config_of
from longlora_plugin.rope.spelling import (
    OLD_NAMES,
    ORIGINAL,
    keep_both_spellings,
    write_rope,
)

NOT_OF_THE_MODEL = {
    "quantization_config",
    "dtype",
    "torch_dtype",
    "use_cache",
    "architectures",
    "auto_map",
    "transformers_version",
    "_name_or_path",
    "_attn_implementation",
    "_attn_implementation_internal",
    "_experts_implementation",
}
"""What training sets for itself (quantization, precision, caching) and what is the base's own."""
OF_TOKENS = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
"""What tokens that a run adds change."""


def trained_config(
    base: Any, adapter_dir: Path, recipe: Mapping[str, Any]
) -> tuple[Any, list[str]]:
    """The transformers config of the trained model.

    Args:
        base: the base model's transformers config; not changed.
        adapter_dir: folder of the adapter, with the run's config.json where the run saved one; the
            recipe's config counts where it did not.
        recipe: fields of the config that the recipe sets by now.

    Returns:
        The config, and a line for each field in which the recipe disagrees with the run.

    Raises:
        ValueError: the run's config cannot be read, or is of another kind of model.
    """
    planned = copy.deepcopy(base)
    for name, value in recipe.items():
        setattr(planned, name, copy.deepcopy(value))
    path = adapter_dir / "config.json"
    if not path.is_file():
        return planned, []
    try:
        kind = read_json(path).get("model_type")
        if kind != base.model_type:
            raise ValueError(
                f"it is of a {kind} model, the base model is {base.model_type}: write the "
                "base_model it was trained on"
            )
        trained = type(base).from_pretrained(adapter_dir)
    except (OSError, ValueError) as error:
        raise ValueError(f"the run's {path} cannot be used: {error}") from None
    expected, found = _fields(planned), _fields(trained)
    return trained, [
        f"{name}: the run was trained with {found.get(name)}, the recipe says "
        f"{expected.get(name)}; it counts as it was trained"
        for name in sorted(expected.keys() | found.keys())
        if expected.get(name) != found.get(name)
    ]


def for_base_weights(trained: Any, base: Any) -> Any:
    """A copy of a trained model's config with which the base model's weights can be loaded.

    They are quantized as the base's are, and rows of added tokens are appended after loading.
    """
    config = copy.deepcopy(trained)
    if hasattr(config, "quantization_config") and not hasattr(base, "quantization_config"):
        del config.quantization_config
    rows = text_config_of(base).vocab_size
    for ours, theirs in ((config, base), (text_config_of(config), text_config_of(base))):
        for name in OF_TOKENS:
            value = getattr(ours, name, None)
            # An embedding refuses a padding token that it has no row for.
            if isinstance(value, int) and (name == "vocab_size" or value >= rows):
                setattr(ours, name, getattr(theirs, name, None))
    return config


def _fields(config: Any) -> dict[str, Any]:
    """What decides a model, RoPE in the one spelling that counts however it was written."""
    written = copy.deepcopy(config)
    keep_both_spellings(written)
    read = type(config).from_dict(written.to_dict())
    skipped = {*NOT_OF_THE_MODEL, *OF_TOKENS, *OLD_NAMES}
    if not hasattr(type(config)(), ORIGINAL):
        skipped.add(ORIGINAL)  # of the families' own fields only Phi-3 has it
    fields = _without(read.to_dict(), skipped)
    return {**fields, "rope_parameters": rope_parameters_of(read)}


def _without(fields: Mapping[str, Any], skipped: Container[str]) -> dict[str, Any]:
    return {
        name: _without(value, skipped) if isinstance(value, Mapping) else value
        for name, value in fields.items()
        if name not in skipped
    }


def config_json(raw: Mapping[str, Any], base: Any, trained: Any) -> dict[str, Any]:
    """What `config.json` of the trained model says: the base's, with what was trained otherwise.

    Args:
        raw: the base's `config.json`.
        base: its transformers config.
        trained: the trained model's.
    """
    config = _with(raw, _differences(base.to_dict(), trained.to_dict()))
    text = text_config_of(trained)
    parameters, maximum = rope_parameters_of(text), getattr(text, "max_position_embeddings", None)
    return write_rope(config, parameters, maximum) if parameters and maximum else config


def _differences(own: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    changed: dict[str, Any] = {}
    for name, value in other.items():
        if name in NOT_OF_THE_MODEL or own.get(name) == value:
            continue
        if name.endswith("_config") and isinstance(value, Mapping):
            changed[name] = _differences(own.get(name) or {}, value)
        else:
            changed[name] = value
    return changed


def _with(raw: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    # A `rope_scaling` would replace what the run has in `rope_parameters`.
    result = {
        k: v for k, v in raw.items() if "rope_parameters" not in changes or k not in OLD_NAMES
    }
    for name, value in changes.items():
        nested = name.endswith("_config") and isinstance(value, Mapping)
        result[name] = _with(result.get(name) or {}, value) if nested else value
    return result

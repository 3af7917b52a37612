"""The config of the model that was trained: the base's, with everything the run had set.

The run saved its config in the adapter's folder. That, not the recipe as it reads today, says what
was trained: the recipe may have changed since, or had keys overridden on the command line.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longlora_plugin.rope.base_config import rope_parameters_of, text_config_of
from longlora_plugin.rope.spelling import OLD_NAMES, write_rope

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


def trained_config(
    base: Any, adapter_dir: Path, recipe: Mapping[str, Any]
) -> tuple[Any, list[str]]:
    """The transformers config of the trained model.

    Args:
        base: the base model's transformers config.
        adapter_dir: folder of the adapter, with the run's config.json where the run saved one.
        recipe: fields of the config that the recipe sets.

    Returns:
        The config, and a line for each field in which the recipe disagrees with the run.

    Raises:
        ValueError: the run's config is of another kind of model.
    """
    planned = copy.deepcopy(base)
    for name, value in recipe.items():
        setattr(planned, name, value)
    path = adapter_dir / "config.json"
    if not path.is_file():
        return planned, []
    run = json.loads(path.read_text(encoding="utf-8"))
    if run.get("model_type") != base.model_type:
        raise ValueError(
            f"the run's {path} is of a {run.get('model_type')} model, the base model is "
            f"{base.model_type}: write the base_model it was trained on"
        )
    trained = type(base).from_pretrained(adapter_dir)
    values = {name: (_field(planned, name), _field(trained, name)) for name in recipe}
    return trained, [
        f"{name}: the run was trained with {found}, the recipe says {expected}; it counts as it "
        "was trained"
        for name, (expected, found) in values.items()
        if expected != found
    ]


def _field(config: Any, name: str) -> Any:
    """A field's value; RoPE, which has several spellings, as a whole."""
    if name in ("rope_parameters", "rope_scaling", "rope_theta"):
        written = rope_parameters_of(config)
        return {key: value for key, value in written.items() if key != "attention_factor"}
    return config.to_dict().get(name)


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

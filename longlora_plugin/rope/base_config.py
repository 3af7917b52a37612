"""What a base model's config says about RoPE, whatever its age and form."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

STORES_ORIGINAL = ("yarn", "llama3", "longrope")
"""Types whose parameters hold the original context."""

LINEAR_TYPES = ("linear", "proportional")
"""Types whose parameters do not say whether the config's maximum is the scaled or the unscaled one.

This package and Gemma 3 write the scaled one; the original LongLoRA models and Vicuna kept the
unscaled one. `linear_maximum_of` tells them apart.
"""

PRETRAINING_CONTEXTS = {1e4: (2048, 4096), 5e5: (8192,), 1e6: (32768,)}
"""θ → contexts that models with it were pretrained on: LLaMA 1 and 2; Llama 3; Qwen2, Mistral."""

EXTENDED_LAYERS = "full_attention"
"""The layer type that is extended where types differ (Gemma 3): a sliding window never grows."""


def rope_parameters_of(base_config: Any) -> dict[str, Any]:
    """The config's `rope_parameters`, complete and normalised, also from the fields of old configs
    (`rope_scaling`, `rope_theta`, `rotary_pct`, …). Nested by layer type where the config's are;
    empty for a model without RoPE.
    """
    config = text_config_of(base_config)
    if why_no_rope(config):
        return {}
    written = (
        getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    )
    if any(isinstance(value, Mapping) for value in written.values()):
        return {
            name: None if value is None else _normal(config, value, nested=True)
            for name, value in written.items()
            if value is None or isinstance(value, Mapping)
        }
    return _normal(config, written, nested=False)


def pretrained_context_of(base_config: Any) -> int:
    """Tokens the base model was pretrained on, before any RoPE scaling (8192 for Llama 3.1).

    Raises:
        ValueError: the config does not say.
    """
    return contexts_of(base_config)[0]


def base_context_of(base_config: Any) -> int:
    """Tokens the base model handles as it is, its RoPE scaling included (131072 for Llama 3.1).

    Raises:
        ValueError: the config does not say.
    """
    return contexts_of(base_config)[1]


def has_rope(base_config: Any) -> bool:
    """Whether the base model has rotary embeddings that its config can scale."""
    return why_no_rope(text_config_of(base_config)) is None


def contexts_of(base_config: Any, given: int | None = None) -> tuple[int, int]:
    """(original, supported) context of the base model, in tokens.

    Args:
        given: the original context, where the user knows better than the config.

    Raises:
        ValueError: nobody says, or `given` contradicts the original that the base's scaling stores.
    """
    config = text_config_of(base_config)
    layer = extended_layer(rope_parameters_of(config))[1]
    rope_type = layer.get("rope_type", "default")
    factor = 1.0 if rope_type == "default" else float(layer.get("factor") or 1.0)
    stored = layer.get("original_max_position_embeddings")
    maximum = maximum_of(config)
    if rope_type in STORES_ORIGINAL and given and given != stored:
        raise ValueError(
            f"original_context: {given}, but the base model's {rope_type} scaling starts from "
            f"{stored} tokens; leave original_context out, or write replace: true in rope: to drop "
            "that scaling"
        )
    known = given or stored
    if known:
        original = int(known)
        scaled = round(original * factor)
    elif maximum is None:
        raise ValueError(
            "the base model's config has no max_position_embeddings; write original_context: "
            "<tokens the base was trained on>"
        )
    elif rope_type in LINEAR_TYPES and linear_maximum_of(layer, maximum) != "unscaled":
        original, scaled = round(maximum / factor), maximum
    else:
        original, scaled = maximum, round(maximum * factor)
    if rope_type == "yarn":
        return original, max(scaled, maximum or 0)
    if rope_type in STORES_ORIGINAL and maximum and maximum > original:
        # Here the factor is not the ratio of the two: Llama 3.1 has 8 for 16 times, Llama 3.2 32.
        return original, maximum
    return original, scaled


def linear_maximum_of(layer: Mapping[str, Any], maximum: int) -> str:
    """Whether the maximum next to a linear factor is the "scaled" or "unscaled" one, or "unclear".

    A maximum of 4096 with a factor of 8 cannot be the scaled one: no Llama was pretrained on 512
    tokens. With a factor of 2 it is LLaMA 1 extended, or Llama 2 whose maximum was left alone.
    """
    contexts = PRETRAINING_CONTEXTS.get(float(layer["rope_theta"]), ())
    if maximum not in contexts:
        return "scaled"
    factor = float(layer.get("factor") or 1.0)
    extended = any(math.ceil(maximum / context) == factor for context in contexts)
    return "unclear" if extended else "unscaled"


def refuse_linear_of_unclear_maximum(base: Any) -> None:
    """Stop where both readings of a linear base's maximum are likely.

    Raises:
        ValueError: names both readings and what to write for each.
    """
    config = text_config_of(base)
    layer, maximum = extended_layer(rope_parameters_of(config))[1], maximum_of(config)
    if layer.get("rope_type") not in LINEAR_TYPES or maximum is None:
        return
    if linear_maximum_of(layer, maximum) == "unclear":
        factor = float(layer["factor"])
        raise ValueError(
            f"the base model has max_position_embeddings {maximum} and linear RoPE × {factor:g}, "
            f"which reads two ways: {round(maximum / factor)} tokens extended to {maximum} (write "
            f"original_context: {round(maximum / factor)}), or {maximum} extended to "
            f"{round(maximum * factor)} (write original_context: {maximum})"
        )


def text_config_of(base: Any) -> Any:
    """`base` as an object with the fields of its text model; a mapping's are copied."""
    if hasattr(base, "get_text_config"):
        return base.get_text_config()
    data = copy.deepcopy(dict(base) if isinstance(base, Mapping) else dict(vars(base)))
    if data.get("model_type"):
        # A config class knows its defaults and old field names (rotary_pct, rope_local_base_freq).
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        if data["model_type"] in CONFIG_MAPPING:
            try:
                return CONFIG_MAPPING[data["model_type"]].from_dict(data).get_text_config()
            except Exception as error:
                raise ValueError(
                    f"transformers cannot read the base model's config: {error}"
                ) from error
    if "text_config" in data:
        return text_config_of(data["text_config"])
    return SimpleNamespace(**data)


def why_no_rope(config: Any) -> str | None:
    """Why the config has no RoPE to scale, as the rest of a sentence; None where it has."""
    if getattr(config, "alibi", False):
        return "uses ALiBi, not rotary embeddings"
    if getattr(config, "position_embedding_type", "rope") is None:
        return "uses no position embeddings"
    names = ("rope_parameters", "rope_scaling", "rope_theta", "rotary_emb_base", "rotary_pct")
    if not any(getattr(config, name, None) for name in names):
        return "has no rotary embeddings that its config can scale (no rope_parameters)"
    return None


def extended_layer(parameters: dict[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """The layer type to extend (None where all are alike) and its parameters."""
    if not any(isinstance(value, Mapping) for value in parameters.values()):
        return None, parameters
    if not parameters.get(EXTENDED_LAYERS):
        raise ValueError(
            f"the base model has RoPE for layer types {', '.join(sorted(parameters))}, and only "
            f"{EXTENDED_LAYERS} can be extended; write rope: none"
        )
    return EXTENDED_LAYERS, parameters[EXTENDED_LAYERS]


def maximum_of(config: Any) -> int | None:
    """The maximum length that the config states, in tokens."""
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"):
        if getattr(config, name, None):
            return int(getattr(config, name))
    return None


def rotary_dim_of(config: Any) -> int:
    """Dimensions of a head that are rotated, in the layers to extend; 0 where nothing says."""
    layer_type, layer = extended_layer(rope_parameters_of(config))
    if getattr(config, "is_heterogeneous", False):
        config = config.per_layer_config[layer_type or 0]
    head_dim = getattr(config, "head_dim", None) or getattr(config, "qk_rope_head_dim", None)
    if not head_dim:
        hidden = getattr(config, "hidden_size", None)
        heads = getattr(config, "num_attention_heads", None)
        head_dim = hidden // heads if hidden and heads else 0
    return int(head_dim * float(layer.get("partial_rotary_factor") or 1.0))


def _normal(config: Any, written: Mapping[str, Any], *, nested: bool) -> dict[str, Any]:
    parameters = {
        key: value for key, value in written.items() if key != "type" and value is not None
    }
    parameters = copy.deepcopy(parameters)
    rope_type = parameters.get("rope_type") or written.get("type") or "default"
    parameters["rope_type"] = "longrope" if rope_type == "su" else rope_type
    _fill(parameters, "rope_theta", config, "rope_theta", "rotary_emb_base", "default_theta")
    parameters.setdefault("rope_theta", 10000.0)
    _fill(parameters, "partial_rotary_factor", config, "partial_rotary_factor", "rotary_pct")
    if parameters["rope_type"] in STORES_ORIGINAL:
        own = None if nested else getattr(config, "original_max_position_embeddings", None)
        if own:
            # As transformers does: Phi-3 keeps it outside, and there it counts.
            parameters["original_max_position_embeddings"] = own
        _fill(parameters, "original_max_position_embeddings", config, "max_position_embeddings")
        original, maximum = parameters["original_max_position_embeddings"], maximum_of(config)
        if maximum:
            parameters.setdefault("factor", maximum / original)
    return parameters


def _fill(parameters: dict[str, Any], key: str, config: Any, *fields: str) -> None:
    """Take `key` from the first of the config's `fields` that is set, where it is missing."""
    for name in fields:
        value = getattr(config, name, None)
        if key not in parameters and value is not None and not isinstance(value, Mapping):
            parameters[key] = value

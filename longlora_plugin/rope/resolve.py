"""From a preset's name and a base model's config to what the run's config has to say about RoPE."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from typing import Any

from longlora_plugin import registry
from longlora_plugin.rope.base_config import (
    contexts_of,
    extended_layer,
    maximum_of,
    rope_parameters_of,
    rotary_dim_of,
    text_config_of,
    why_no_rope,
)
from longlora_plugin.rope.presets import SCALING_KEYS, RopeRequest


@dataclass(frozen=True)
class RopeSettings:
    """What to write into the config before the model is built.

    Attributes:
        preset: the preset's name.
        rope_parameters: complete; plain JSON types. Nested by layer type where the base's are.
        max_position_embeddings: the target, except that `dynamic` keeps the original context (it
            starts to scale above this field), and that a base which supports more keeps its own.
        pretrained_context: tokens of the base model's pretraining.
        base_context: tokens the base model handles without these settings.
        factor: the scaling factor written, or target / supported context where only θ changes;
            1.0 where nothing is extended.
        extended: whether `rope_parameters` differ from the base model's.
        config_fields: every field that `apply_rope` sets, by name; for Phi-3 one more than the two
            above. Empty for `none`.
    """

    preset: str
    rope_parameters: dict[str, Any]
    max_position_embeddings: int
    pretrained_context: int
    base_context: int
    factor: float
    extended: bool
    config_fields: dict[str, Any]


def resolve_rope(
    preset: str,
    base_config: Any,
    target_context: int,
    *,
    original_context: int | None = None,
    **options: Any,
) -> RopeSettings:
    """The RoPE settings that extend a base model to `target_context` tokens.

    A target that the base supports already changes nothing, unless options ask for it.

    Args:
        preset: a name in `PRESETS`, or one that an installed package adds.
        base_config: the base model's config, never changed: a transformers config (of a composite
            one the text config counts), or a mapping or object with the fields of a `config.json`.
        target_context: tokens to extend to.
        original_context: tokens the base was pretrained on; default `pretrained_context_of`.
        options: the preset's own (`factor`, `beta_fast`, …), and `replace=True` to drop the base's
            scaling and start from its original context.

    Raises:
        ValueError: a wrong preset, option or target; a base model without RoPE; a scaling of the
            base that the preset cannot extend; a model type that does not take the result.
    """
    function = registry.find("longlora_rope_presets", str(preset), what="RoPE preset")
    target = _tokens("sequence_len", target_context)
    if original_context is not None:
        original_context = _tokens("original_context", original_context)
    replace = preset != "none" and options.pop("replace", False)
    if not isinstance(replace, bool):
        raise ValueError(f"rope: replace: got {replace!r}; write replace: true, or leave it out")
    config = text_config_of(base_config)
    without = why_no_rope(config)
    if without and preset != "none":
        raise ValueError(
            f"base model type {getattr(config, 'model_type', None) or '(unnamed)'!r} {without}, so "
            f"rope: {preset} has nothing to scale; write rope: none, or take a base with RoPE"
        )
    before = {} if without else rope_parameters_of(config)
    layer_type, layer = extended_layer(before)
    if preset == "none" and not maximum_of(config):
        original_context = original_context or target
    original, supported = contexts_of(config, None if replace else original_context)
    if replace:
        supported = original = original_context or original
        layer = {key: value for key, value in layer.items() if key not in SCALING_KEYS}
        layer["rope_type"] = "default"
    request = RopeRequest(
        preset=str(preset),
        base=layer,
        rotary_dim=rotary_dim_of(config),
        pretrained_context=original,
        base_context=supported,
        target_context=target,
        options=dict(options),
        layer_type=layer_type,
    )
    after = layer
    if options or (request.stretch > 1 and preset != "none"):
        after = _checked(request, function(copy.deepcopy(request)))
    settings = _settings(request, config, before, after, replace or original_context is not None)
    if settings.extended:
        _check_model_type_takes(config, settings)
        if getattr(config, "layer_rope_theta", None) and after["rope_theta"] != layer["rope_theta"]:
            raise ValueError(
                f"rope: {preset} changes rope_theta, which base model type {config.model_type!r} "
                "does not read (it has layer_rope_theta); write rope: linear or rope: yarn"
            )
    return settings


def apply_rope(config: Any, settings: RopeSettings) -> None:
    """Write `settings` into a transformers config, in place, before the model is built.

    Of a composite (multimodal) config the text config is changed. A model that exists already does
    not notice.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for name, value in copy.deepcopy(settings.config_fields).items():
        setattr(text, name, value)


def _settings(
    request: RopeRequest, config: Any, before: dict[str, Any], after: dict[str, Any], restart: bool
) -> RopeSettings:
    """Put the extended layer back among the others and choose the maximum."""
    extended = after != (before[request.layer_type] if request.layer_type else before)
    maximum = maximum_of(config) or request.target_context
    if after.get("rope_type") == "dynamic":
        maximum = request.pretrained_context
    elif extended and restart:
        maximum = request.target_context
    elif request.preset != "none":
        maximum = max(maximum, request.target_context)
    parameters = {**before, request.layer_type: after} if request.layer_type else after
    fields: dict[str, Any] = {}
    if request.preset != "none":
        fields = {"rope_parameters": parameters, "max_position_embeddings": maximum}
    outside = "original_max_position_embeddings"
    if outside in after and getattr(config, outside, None) is not None:
        # Phi-3's field outside rope_parameters overrides the one inside it.
        fields[outside] = after[outside]
    return RopeSettings(
        preset=request.preset,
        rope_parameters=parameters,
        max_position_embeddings=maximum,
        pretrained_context=request.pretrained_context,
        base_context=request.base_context,
        factor=float(after.get("factor") or request.stretch) if extended else 1.0,
        extended=extended,
        config_fields=copy.deepcopy(fields),
    )


def _checked(request: RopeRequest, answer: Any) -> dict[str, Any]:
    """A preset's answer in plain JSON types; θ and partial rotary are the base's unless it says."""
    try:
        answer = json.loads(json.dumps(answer, allow_nan=False))
        if isinstance(answer["rope_type"], str):
            return {**request.kept, **answer}
    except (KeyError, TypeError, ValueError):
        pass
    raise ValueError(
        f"RoPE preset {request.preset!r} returned {answer!r}; a preset returns rope_parameters: "
        "a mapping with rope_type and plain JSON values"
    )


def _check_model_type_takes(config: Any, settings: RopeSettings) -> None:
    """Send the settings through the config class, as saving and loading config.json would.

    Phi-3's class, for one, accepts LongRoPE only and reads `yarn` as `longrope`.
    """
    if not hasattr(config, "from_dict"):
        return  # a mapping or object of no known model type: there is no class to ask
    trial = copy.deepcopy(config)
    apply_rope(trial, settings)
    why = "its config class reads them as something else"
    try:
        if rope_parameters_of(type(config).from_dict(trial.to_dict())) == settings.rope_parameters:
            return
    except Exception as error:
        why = str(error).strip().splitlines()[-1].strip()
    raise ValueError(
        f"rope: {settings.preset}: base model type {config.model_type!r} does not take these "
        f"rope_parameters ({why}); write rope: ntk, which only raises θ"
    )


def _tokens(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: got {value!r}; write a whole number of tokens, such as 32768")
    return value

"""From a preset's name and a base model's config to what the run's config has to say about RoPE."""

from __future__ import annotations

import copy
import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from longlora_plugin import registry
from longlora_plugin.rope.base_config import (
    contexts_of,
    extended_layer,
    maximum_of,
    refuse_linear_of_unclear_maximum,
    rope_parameters_of,
    rotary_dim_of,
    text_config_of,
    why_no_rope,
)
from longlora_plugin.rope.layers import why_not_extendable
from longlora_plugin.rope.presets import (
    PRESETS,
    SCALING_KEYS,
    UNSCALED_CHOICES,
    RopeRequest,
    own_preset,
)


@dataclass(frozen=True)
class RopeSettings:
    """What to write into the config before the model is built.

    Attributes:
        preset: the preset's name; what `auto` chose where it was asked.
        rope_parameters: complete; plain JSON types. Nested by layer type where the base's are.
        max_position_embeddings: the target, except that `dynamic` keeps the original context (it
            starts to scale above this field), and that a base which supports more keeps its own.
        pretrained_context: tokens of the base model's pretraining.
        base_context: tokens the base model handles without these settings.
        factor: the scaling factor written, or target / supported context where only θ changes;
            1.0 where nothing is extended.
        extended: whether `rope_parameters` differ from the base model's.
        config_fields: every field that `apply_rope` sets, by name: the two above and, where
            transformers needs them, Phi-3's original context and Mixtral's `head_dim`. Empty for
            `none`.
        chosen_by_auto: why `auto` chose `preset`; None where the recipe names a preset.
    """

    preset: str
    rope_parameters: dict[str, Any]
    max_position_embeddings: int
    pretrained_context: int
    base_context: int
    factor: float
    extended: bool
    config_fields: dict[str, Any]
    chosen_by_auto: str | None = None


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
    registry.find("longlora_rope_presets", str(preset))
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
    before = rope_parameters_of(config)
    if preset == "none" and not maximum_of(config):
        original_context = original_context or target
    request = _request(str(preset), config, before, target, replace, original_context, options)
    restart = replace or original_context is not None
    if original_context is None and (replace or request.stretch > 1) and preset != "none":
        refuse_linear_of_unclear_maximum(config)
    if preset == "auto":
        unchanged = request.stretch == 1 and not replace
        return _auto(request, config, before, restart, unchanged)
    return _extend(request, config, before, restart)


def _request(
    preset: str,
    config: Any,
    before: dict[str, Any],
    target: int,
    replace: bool,
    original_context: int | None,
    options: dict[str, Any],
) -> RopeRequest:
    """What the preset needs to know."""
    layer_type, layer = extended_layer(before)
    original, supported = contexts_of(config, None if replace else original_context)
    if replace:
        supported = original = original_context or original
        layer = {key: value for key, value in layer.items() if key not in SCALING_KEYS}
        layer["rope_type"] = "default"
    return RopeRequest(
        preset=preset,
        base=layer,
        rotary_dim=rotary_dim_of(config),
        pretrained_context=original,
        base_context=supported,
        target_context=target,
        options=options,
        layer_type=layer_type,
    )


def _auto(
    request: RopeRequest, config: Any, before: dict[str, Any], restart: bool, unchanged: bool
) -> RopeSettings:
    """The first of `auto`'s choices that the model type takes."""
    if request.options or not unchanged:
        PRESETS["auto"](request)  # refuses options
        why = why_not_extendable(config, request.rope_type)
        if why:
            raise ValueError(f"rope: auto: base model type {config.model_type!r} {why}")
    choices: tuple[str, ...] = (own_preset(request),)
    reason = f"extends the base model's own {request.rope_type} scaling"
    if unchanged:
        choices = ("none",)
        reason = f"the base model handles {request.base_context} tokens as it is"
    elif request.rope_type == "default":
        choices, reason = UNSCALED_CHOICES, "the base model's RoPE is not scaled"
    refused: ValueError | None = None
    for name in choices:
        try:
            settings = _extend(dataclasses.replace(request, preset=name), config, before, restart)
        except ValueError as error:
            refused = refused or error
            continue
        if refused:
            model_type = getattr(config, "model_type", None) or "its type"
            reason += f", and {model_type} does not take {choices[0]}"
        return dataclasses.replace(settings, chosen_by_auto=reason)
    assert refused is not None
    raise refused


def _extend(
    request: RopeRequest, config: Any, before: dict[str, Any], restart: bool
) -> RopeSettings:
    """What the request's preset makes of the base model, checked against its model type."""
    function = registry.find("longlora_rope_presets", request.preset)
    layer = after = request.base
    if request.options or (request.stretch > 1 and request.preset != "none"):
        after = _checked(request, function(copy.deepcopy(request)))
    settings = _settings(request, config, before, after, restart)
    if not settings.extended:
        return settings
    model_type = getattr(config, "model_type", None) or "(unnamed)"
    why = why_not_extendable(config, after["rope_type"])
    if why:
        raise ValueError(f"rope: {request.preset}: base model type {model_type!r} {why}")
    _check_model_type_takes(config, settings)
    if getattr(config, "layer_rope_theta", None) and after["rope_theta"] != layer["rope_theta"]:
        raise ValueError(
            f"rope: {request.preset} changes rope_theta, which base model type {model_type!r} "
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
    if fields and vars(config).get("head_dim", 0) is None and getattr(config, "hidden_size", None):
        # For yarn, dynamic and longrope transformers reads a head_dim that is there but None.
        fields["head_dim"] = config.hidden_size // config.num_attention_heads
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
    try:
        type(config).from_dict(copy.deepcopy(config).to_dict())
    except Exception as error:
        raise ValueError(
            f"rope: {settings.preset}: transformers cannot read back the config.json that it "
            f"writes for base model type {config.model_type!r} ({error}); write rope: none"
        ) from error
    trial = copy.deepcopy(config)
    apply_rope(trial, settings)
    why = "its config class reads them as something else"
    try:
        if rope_parameters_of(type(config).from_dict(trial.to_dict())) == settings.rope_parameters:
            return
    except Exception as error:
        why = str(error).strip().splitlines()[-1].strip()
    advice = "ntk, which only raises θ" if settings.preset not in ("ntk", "theta") else "none"
    raise ValueError(
        f"rope: {settings.preset}: base model type {config.model_type!r} does not take these "
        f"rope_parameters ({why}); write rope: {advice}"
    )


def _tokens(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: got {value!r}; write a whole number of tokens, such as 32768")
    return value

"""RoPE in a `config.json`, in the spelling of every reader.

transformers 5 reads `rope_parameters`; transformers 4, MLX, mistral.rs and most converters read
`rope_theta` and `rope_scaling` at the top, and silently take the unscaled RoPE where these are
missing. So both are written. In transformers 5 a `rope_scaling` in the file *replaces*
`rope_parameters`, hence it is complete: everything but θ and the rotated share, which are
written at the top.

The original context is inside `rope_scaling`. At the top as well it is read by

- `longrope`: transformers 4 finds it nowhere else. vLLM then serves the original context unless
  `--max-model-len` says more, which is seen at once; wrong frequencies are not.
- `llama3`: llama.cpp's converter finds it nowhere else, and takes 8192.
- `yarn`: nobody; some releases of transformers 4 would replace the factor by maximum / original.

Where layer types differ, the old spelling exists for Gemma 3, Gemma 3n and OLMo 3 (the scaling is
that of the full-attention layers) and for the two θ of ModernBERT, whose `rope_scaling` would
reach its sliding layers too. All other such families are younger than transformers 5: they have
one spelling, and a flat `rope_scaling` would replace their nested parameters.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

ORIGINAL = "original_max_position_embeddings"
ORIGINAL_AT_THE_TOP = ("longrope", "llama3")

_FLAT_NAMES = ("rope_theta", "partial_rotary_factor")
_FLAT_NAMES_OF = dict.fromkeys(("gpt_neox", "gpt_neox_japanese"), ("rotary_emb_base", "rotary_pct"))
_THETAS_BY_LAYER = {
    "gemma3_text": {"full_attention": "rope_theta", "sliding_attention": "rope_local_base_freq"},
    "gemma3n_text": {"full_attention": "rope_theta", "sliding_attention": "rope_local_base_freq"},
    "olmo3": {"full_attention": "rope_theta"},
    "modernbert-decoder": {
        "full_attention": "global_rope_theta",
        "sliding_attention": "local_rope_theta",
    },
}
_ONLY_FIELDS_OF = {
    "phi3": ("type", "short_factor", "long_factor"),
    **dict.fromkeys(
        ("olmo", "olmo2", "fuyu", "hunyuan_v1_dense", "hunyuan_v1_moe"), ("type", "factor")
    ),
}
"""Families whose classes in transformers 4 refuse a `rope_scaling` with any other field."""
_SCALES_FULL_LAYERS_ONLY = ("gemma3_text", "gemma3n_text", "olmo3")

OLD_NAMES = (
    *("rope_scaling", "rope_theta", "partial_rotary_factor", "rotary_emb_base", "rotary_pct"),
    *("rope_local_base_freq", "global_rope_theta", "local_rope_theta"),
)
"""Fields that say what `rope_parameters` says, and contradict it where only one is changed."""

__all__ = ["OLD_NAMES", "keep_both_spellings", "rope_fields", "write_rope"]


def rope_fields(
    rope_parameters: Mapping[str, Any], max_position_embeddings: int, model_type: str | None = None
) -> dict[str, Any]:
    """Everything that a text model's `config.json` says about RoPE, in both spellings.

    Args:
        rope_parameters: complete, as in `RopeSettings`; nested by layer type where the model's are.
        max_position_embeddings: in tokens.
        model_type: transformers' name; a few families have field names of their own.
    """
    parameters = copy.deepcopy(dict(rope_parameters))
    fields: dict[str, Any] = {
        "rope_parameters": parameters,
        "max_position_embeddings": max_position_embeddings,
    }
    if any(isinstance(value, Mapping) for value in parameters.values()):
        thetas = _THETAS_BY_LAYER.get(model_type or "", {})
        for layer_type, name in thetas.items():
            if parameters.get(layer_type):
                fields[name] = parameters[layer_type]["rope_theta"]
        if model_type in _SCALES_FULL_LAYERS_ONLY:
            fields |= _scaling(parameters["full_attention"], max_position_embeddings, model_type)
        return fields
    theta_name, share_name = _FLAT_NAMES_OF.get(model_type or "", _FLAT_NAMES)
    fields[theta_name] = parameters["rope_theta"]
    if "partial_rotary_factor" in parameters:
        fields[share_name] = parameters["partial_rotary_factor"]
    fields |= _scaling(parameters, max_position_embeddings, model_type)
    if parameters["rope_type"] in ORIGINAL_AT_THE_TOP:
        fields[ORIGINAL] = parameters[ORIGINAL]
    return fields


def write_rope(
    config: Mapping[str, Any], rope_parameters: Mapping[str, Any], max_position_embeddings: int
) -> dict[str, Any]:
    """A copy of a `config.json` that has this RoPE in both spellings and nothing that contradicts.

    Of a composite config the text part is changed. A second call changes nothing.
    """
    changed = copy.deepcopy(dict(config))
    if isinstance(changed.get("text_config"), Mapping):
        text = write_rope(changed["text_config"], rope_parameters, max_position_embeddings)
        return {**changed, "text_config": text}
    fields = rope_fields(rope_parameters, max_position_embeddings, changed.get("model_type"))
    for name in OLD_NAMES:
        changed.pop(name, None)
    original = _original(rope_parameters)
    if ORIGINAL in changed and original:
        changed[ORIGINAL] = original  # it outranks the one inside
    return {**changed, **fields}


def keep_both_spellings(config: Any) -> None:
    """Make every later `save_pretrained` of a transformers config write both spellings, in place.

    `config.rope_scaling` is another name of `config.rope_parameters` in transformers 5, so the old
    fields go where saving finds them and nothing else does. A model without RoPE is left alone.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    parameters = getattr(text, "rope_parameters", None)
    maximum = getattr(text, "max_position_embeddings", None)
    if not parameters or not maximum:
        return
    from longlora_plugin.rope.base_config import rope_parameters_of

    fields = rope_fields(rope_parameters_of(text), maximum, getattr(text, "model_type", None))
    for name, value in fields.items():
        if name not in ("rope_parameters", "max_position_embeddings"):
            vars(text)[name] = value


def _scaling(layer: Mapping[str, Any], maximum: int, model_type: str | None) -> dict[str, Any]:
    """`rope_scaling` of one set of parameters; {} where θ and the rotated share are all."""
    scaling = {key: copy.deepcopy(value) for key, value in layer.items() if key not in _FLAT_NAMES}
    rope_type = scaling["rope_type"]
    if set(scaling) == {"rope_type"} and rope_type == "default":
        return {}
    implied = {"rope_type"}
    if rope_type == "longrope":
        # transformers 4 knows the ratio of the contexts only, transformers 5 takes the factor.
        original, factor = scaling[ORIGINAL], scaling.get("factor")
        if factor is None or math.isclose(factor, maximum / original):
            implied |= {"factor", ORIGINAL}
        elif "attention_factor" not in scaling:
            scaling["attention_factor"] = math.sqrt(1 + math.log(factor) / math.log(original))
    scaling["type"] = rope_type
    fields = _ONLY_FIELDS_OF.get(model_type or "", ())
    if scaling.keys() - implied == set(fields):
        scaling = {name: scaling[name] for name in fields}
    return {"rope_scaling": scaling}


def _original(parameters: Mapping[str, Any]) -> int | None:
    layers = [value for value in parameters.values() if isinstance(value, Mapping)]
    found = [layer[ORIGINAL] for layer in layers or [parameters] if layer.get(ORIGINAL)]
    return found[0] if found else None

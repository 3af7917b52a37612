"""Whether a built model has the RoPE that its run decided on.

RoPE takes effect only while a model is built, and a key that is lost on the way there leaves the
log, config.json and the merged model in agreement with each other, not with what was trained.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any


def check_built_rope(model: Any, config_fields: Mapping[str, Any]) -> int:
    """Compare a model's rotary embeddings with new ones of the same classes, before any forward.

    Args:
        model: plain or wrapped by PEFT.
        config_fields: the fields of the config that decide RoPE, as `RopeSettings` has them.

    Returns:
        How many rotary embeddings were compared; those without a transformers config cannot be.

    Raises:
        ValueError: frequencies (`inv_freq`, of each layer type) or `attention_scaling` differ.
    """
    compared = 0
    for name, module in _rotary_embeddings(model):
        config = copy.deepcopy(module.config)
        for field, value in copy.deepcopy(dict(config_fields)).items():
            setattr(config, field, value)
        expected = type(module)(config)
        for buffer, right in _frequencies(expected).items():
            if not _equal(_frequencies(module).get(buffer), right):
                raise ValueError(
                    f"the model was built with another RoPE than {dict(config_fields)}: {buffer} "
                    f"of {name} is {_start(_frequencies(module).get(buffer))}, not "
                    f"{_start(right)}. Something in the recipe replaces the model's config "
                    "(model_kwargs, another plugin); remove it"
                )
        compared += 1
    return compared


def _rotary_embeddings(model: Any) -> Iterator[tuple[str, Any]]:
    """The rotary embeddings of the language model; a vision tower's have another config."""
    kind = type(model.config.get_text_config())
    for name, module in model.named_modules():
        if type(getattr(module, "config", None)) is kind and _frequencies(module):
            yield name, module


def _frequencies(module: Any) -> dict[str, Any]:
    """Name → frequencies, or the factor on cosine and sine."""
    found: dict[str, Any] = {
        name: buffer
        for name, buffer in module.named_buffers(recurse=False)
        if name.endswith("inv_freq") and "original" not in name
    }
    if found:
        scalings = (name for name in vars(module) if name.endswith("attention_scaling"))
        found |= {name: getattr(module, name) for name in scalings}
    return found


def _equal(built: Any, right: Any) -> bool:
    import torch

    if not isinstance(right, torch.Tensor):
        return built is not None and abs(built - right) <= 1e-6 * abs(right)
    if built is None or built.shape != right.shape:
        return False
    if built.is_meta or right.is_meta:
        return True  # of a process that gets its model from another one
    close = 1e-5 if built.dtype == torch.float32 else 1e-2
    return torch.allclose(built.float().cpu(), right.float().cpu(), rtol=close, atol=0.0)


def _start(values: Any) -> str:
    if not hasattr(values, "tolist"):
        return str(values)
    return ", ".join(f"{value:.4g}" for value in values.flatten()[-3:].tolist()) + " at its end"

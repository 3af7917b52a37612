"""Shifted training of a family's tiny model against the original under the oracle's mask per head.

The reference is the original model in training mode whose full-attention layers are handed an
explicit mask per head, [batch, heads, tokens, tokens], written by `tests/reference.py`. Models
compute in float32 here and there (norms, softmax, RoPE) whatever their dtype; `InFloat64` turns
that off on both sides, so that the comparison is a float64 one.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from attention_material import GROUP
from families import FAMILIES
from family_models import build_family
from reference import head_masks
from torch.overrides import TorchFunctionMode
from unsupported_families import UNSUPPORTED

from longlora_plugin.attention import enable_shifted_attention

TOKENS = 21
DOCUMENTS = [12, 9]
TOLERANCE = 1e-9
"""Largest relative error in float64, of logits and of every parameter's gradient."""


class InFloat64(TorchFunctionMode):
    """Where code asks for float32, give it float64."""

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        args = tuple(torch.float64 if x is torch.float32 else x for x in args)
        kwargs = {k: torch.float64 if x is torch.float32 else x for k, x in (kwargs or {}).items()}
        return func(*args, **kwargs)


def build(name: str, implementation: str) -> torch.nn.Module:
    """The family's tiny model, always with the same random weights, in float64 and training."""
    return copy.deepcopy(_built(name, implementation))


@cache
def _built(name: str, implementation: str) -> torch.nn.Module:
    return build_family(name, FAMILIES[name], implementation)


def tokens(rows: int = 1, length: int = TOKENS, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(10, 97, (rows, length), generator=generator)


def logits(model: torch.nn.Module, ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
    """[rows, tokens, vocabulary]; routers that draw at random draw the same each time."""
    torch.manual_seed(0)
    zeros = {name: torch.zeros_like(ids) for name in FAMILIES[model.family].zeros}
    return model(ids, **{"use_cache": False, **zeros, **inputs}).logits


def logits_in_float64(model: torch.nn.Module, ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
    with InFloat64():
        return logits(model, ids, **inputs)


def gradients(model: torch.nn.Module, out: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of a fixed random weighing of the logits, for every parameter that takes part."""
    model.zero_grad()
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=out.dtype)
    with InFloat64():
        (out * weights).sum().backward()
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def error(actual: torch.Tensor, expected: torch.Tensor, floor: float = 0.0) -> float:
    """Largest difference, relative to the largest number expected or to `floor`, if greater."""
    largest = max(expected.abs().max().item(), floor)
    return (actual - expected).abs().max().item() / (largest or 1.0)


@contextmanager
def masked_per_head(
    model: torch.nn.Module,
    name: str,
    implementation: str,
    documents: list[int] | None = None,
    only: tuple[int, ...] | None = None,
) -> Iterator[None]:
    """The stock model, its full-attention layers handed the oracle's mask per head."""
    family = FAMILIES[name]
    mask = head_masks(documents or [TOKENS], GROUP, family.heads, family.kv_heads)[None]
    if implementation == "eager":
        forbidden = torch.finfo(torch.float64).min
        mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, forbidden)

    def hand_over(module: torch.nn.Module, args: Any, kwargs: Any) -> Any:
        given = inspect.signature(module.forward).bind(*args, **kwargs)
        stock = given.arguments.get("attention_mask")
        given.arguments["attention_mask"] = (
            {**stock, "causal": mask} if isinstance(stock, dict) else mask  # Zaya's is a dict
        )
        return given.args, given.kwargs

    layers = [
        module
        for module in model.modules()
        if getattr(module, "layer_idx", None) in (only or family.full)
        and type(module).__name__.endswith(("Attention", "MLA"))
        and "attention_mask" in inspect.signature(module.forward).parameters
    ]
    assert len(layers) == (len(only) if only else family.layers), [type(layer) for layer in layers]
    hooks = [layer.register_forward_pre_hook(hand_over, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@dataclass(frozen=True)
class Comparison:
    """Shifted training against the stock model under a mask per head."""

    error: float
    from_full_attention: float
    layers: int
    calls: int
    skipped: dict[str, int]


@cache
def compare(name: str, implementation: str) -> Comparison:
    model, ids = build(name, implementation), tokens(2)
    full = logits_in_float64(model, ids).detach()
    with masked_per_head(model, name, implementation):
        expected = logits_in_float64(model, ids)
        expected_gradients = gradients(model, expected)
    handle = enable_shifted_attention(model, group_size=GROUP)
    actual = logits_in_float64(model, ids)
    calls = handle.calls
    actual_gradients = gradients(model, actual)
    handle.remove()
    assert actual_gradients.keys() == expected_gradients.keys()
    # Some gradients are zero but for rounding: the bias of keys changes no softmax.
    floor = 1e-5 * max(gradient.abs().max().item() for gradient in expected_gradients.values())
    errors = [error(actual, expected)] + [
        error(actual_gradients[key], expected_gradients[key], floor) for key in expected_gradients
    ]
    return Comparison(max(errors), error(actual, full), handle.layers, calls, handle.skipped)


@cache
def refusal(name: str) -> str:
    """Why S² covers no layer of an unsupported family."""
    model = build_family(name, UNSUPPORTED[name][0], "eager")
    with pytest.raises(ValueError, match="shifted attention covers no layer of ") as raised:
        enable_shifted_attention(model, group_size=GROUP)
    return str(raised.value).split(": ", 1)[1]

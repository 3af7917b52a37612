"""transformers' registries of attention and of mask functions, wrapped while a model is enabled.

- The *mask* wrapper hands a covered model in training the documents of the batch, [B, 1, 1, N],
  instead of an N × N mask. It is an ordinary argument of the layers, so gradient checkpointing
  keeps it with the layer it belongs to.
- The *attention* wrapper computes S²-Attn for covered layers in training.

Names do not change, and every other model runs the original functions.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any, Protocol

import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.masking_utils import causal_mask_function as plain_causal

from longlora_plugin.attention import packing
from longlora_plugin.attention.eligibility import REGISTRY_NAME, limits_attention

MARK = "_longlora_shifted_attention"
"""Attribute of a covered attention module: its handle."""


class Handle(Protocol):
    """What the wrappers ask of an enabled model."""

    active: bool
    position_ids: torch.Tensor | None

    def training(self, config: Any) -> bool:
        """Whether a model of this `config` is about to train with S²-Attn."""

    def attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """S²-Attn with the arguments of a transformers attention function."""


_enabled: list[Handle] = []


def enable(handle: Handle, covered: list[torch.nn.Module]) -> None:
    """Mark the covered modules, and wrap the registries that their forward looks into."""
    for module in covered:
        setattr(module, MARK, handle)
    _enabled.append(handle)
    _wrap_registries(covered)


def disable(handle: Handle, modules: list[torch.nn.Module]) -> None:
    """Undo `enable`; the last one unwraps the registries."""
    for module in modules:
        if module.__dict__.get(MARK) is handle:
            delattr(module, MARK)
    if handle in _enabled:
        _enabled.remove(handle)
        if not _enabled:
            _unwrap_registries()


def enabled() -> tuple[Handle, ...]:
    """Handles of all models that train with S²-Attn."""
    return tuple(_enabled)


def are_document_ids(mask: Any) -> bool:
    """Whether a mask is what the mask wrapper hands out."""
    return (
        isinstance(mask, torch.Tensor)
        and mask.dtype == torch.int64
        and mask.dim() == 4
        and mask.shape[1:3] == (1, 1)
    )


def _attention_wrapper(original: Callable[..., Any]) -> Callable[..., Any]:
    def attention(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        handle = module.__dict__.get(MARK)
        if (
            handle is None
            or not handle.active
            or not module.training
            or query.shape[2] != key.shape[2]
            or kwargs.get("is_causal") is False
        ):
            if are_document_ids(attention_mask):
                raise ValueError(
                    f"{type(module).__name__} runs the model's own attention, but got the mask of "
                    "shifted attention; call handle.remove() before changing the model"
                )
            return original(module, query, key, value, attention_mask, *args, **kwargs)
        return handle.attend(module, query, key, value, attention_mask, *args, **kwargs)

    return attention


def _mask_wrapper(original: Callable[..., Any]) -> Callable[..., Any]:
    def mask(*args: Any, **kwargs: Any) -> Any:
        config = kwargs.get("config")
        handle = next((handle for handle in _enabled if handle.training(config)), None)
        if (
            args
            or config is None
            or handle is None
            or kwargs["q_length"] != kwargs["kv_length"]
            or kwargs.get("use_vmap")
            or limits_attention(kwargs.get("local_size"), config)
        ):
            return original(*args, **kwargs)
        batch, length = kwargs["batch_size"], kwargs["q_length"]
        padding, positions = kwargs.get("attention_mask"), handle.position_ids
        if padding is not None and bool(padding.all()):
            padding = None
        if positions is not None and positions.shape not in ((batch, length), (1, length)):
            positions = None
        # None means "plain causal" to these implementations, but "no mask" to the others, of which
        # a layer that keeps the original path may be given it too.
        none_is_causal = config._attn_implementation not in ("eager", "flex_attention")
        if (
            none_is_causal
            and kwargs.get("allow_is_causal_skip", True)
            and padding is None
            and positions is None
            and kwargs["mask_function"] is plain_causal
        ):
            return None
        ids = packing.ids_of_mask(
            kwargs["mask_function"],
            padding,
            batch=batch,
            length=length,
            device=kwargs.get("device", "cpu"),
            position_ids=positions,
        )
        return original(**kwargs) if ids is None else ids[:, None, None, :]

    mask.original = original  # type: ignore[attr-defined]
    return mask


def original_mask(document_ids: torch.Tensor, config: Any, dtype: torch.dtype) -> Any:
    """The mask that [B, 1, 1, N] document ids stand for, as the model's own attention wants it."""
    ids = document_ids[:, 0, 0]

    def same_document(
        b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, kv: torch.Tensor
    ) -> torch.Tensor:
        return (kv <= q) & (ids[b, q] == ids[b, kv])

    function = ALL_MASK_ATTENTION_FUNCTIONS[config._attn_implementation]
    return getattr(function, "original", function)(
        batch_size=ids.shape[0],
        q_length=ids.shape[1],
        kv_length=ids.shape[1],
        mask_function=same_document,
        attention_mask=ids != packing.PADDING,
        allow_is_causal_skip=False,
        dtype=dtype,
        device=ids.device,
        config=config,
    )


_wrapped_attention: list[Any] = []
_wrapped_masks: dict[str, Any] = {}


def _wrap_registries(covered: list[torch.nn.Module]) -> None:
    for module in covered:
        # A modelling file may keep a registry of its own (Doge), so ask the file.
        scope = inspect.unwrap(type(module).forward).__globals__
        registry = scope.get(REGISTRY_NAME) or _global_registry()
        for known in (registry, _global_registry()):
            if not any(known is wrapped for wrapped in _wrapped_attention):
                _wrap_attention_registry(known)
        implementation = module.config._attn_implementation
        if implementation not in _wrapped_masks and implementation in ALL_MASK_ATTENTION_FUNCTIONS:
            original = ALL_MASK_ATTENTION_FUNCTIONS[implementation]
            _wrapped_masks[implementation] = (
                original if implementation in ALL_MASK_ATTENTION_FUNCTIONS._local_mapping else None
            )
            ALL_MASK_ATTENTION_FUNCTIONS[implementation] = _mask_wrapper(original)


def _global_registry() -> Any:
    return sys.modules["transformers.modeling_utils"].ALL_ATTENTION_FUNCTIONS


def _wrap_attention_registry(registry: Any) -> None:
    original = type(registry).get_interface

    def get_interface(implementation: str, default: Callable[..., Any]) -> Callable[..., Any]:
        return _attention_wrapper(original(registry, implementation, default))

    registry.get_interface = get_interface
    _wrapped_attention.append(registry)


def _unwrap_registries() -> None:
    for registry in _wrapped_attention:
        del registry.get_interface
    _wrapped_attention.clear()
    for implementation, original in _wrapped_masks.items():
        del ALL_MASK_ATTENTION_FUNCTIONS[implementation]
        if original is not None:
            ALL_MASK_ATTENTION_FUNCTIONS[implementation] = original
    _wrapped_masks.clear()

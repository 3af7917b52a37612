"""transformers' registries of attention and of mask functions, wrapped while a model is enabled.

- The *mask* wrapper hands a covered model in a training pass the documents of the batch,
  [B, 1, 1, N], instead of an N × N mask. It is an ordinary argument of the layers, so gradient
  checkpointing keeps it with the layer it belongs to.
- The *attention* wrapper computes S²-Attn for covered layers that are given one.

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

from longlora_plugin.attention import generation, packing
from longlora_plugin.attention.eligibility import REGISTRY_NAME, limits_attention

MARK = "_longlora_shifted_attention"
"""Attribute of a covered attention module: its handle."""


WHOLE_ROWS = torch.int8
"""dtype of document ids that say: every row is one document, there is nothing to read."""


class Handle(Protocol):
    """What the wrappers ask of an enabled model."""

    @property
    def is_sharded(self) -> bool:
        """Whether a batch is part of rows that other processes hold, too."""

    def position_ids_of(self, config: Any) -> tuple[bool, torch.Tensor | None]:
        """Whether a model of this `config` is in a training pass, and its positions."""

    def shifts(self, module: torch.nn.Module, attention_mask: Any) -> bool:
        """Whether a covered layer that is given this mask uses S²-Attn."""

    def remember(self, document_ids: torch.Tensor, documents: packing.Documents) -> None:
        """Note the documents that a mask stands for, so that no layer has to read them."""

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
    generation.watch()


def disable(handle: Handle, modules: list[torch.nn.Module]) -> None:
    """Undo `enable`; the last one unwraps the registries."""
    for module in modules:
        if module.__dict__.get(MARK) is handle:
            delattr(module, MARK)
    if handle in _enabled:
        _enabled.remove(handle)
        if not _enabled:
            _unwrap_registries()
            generation.unwatch()


def are_document_ids(mask: Any) -> bool:
    """Whether a mask is what the mask wrapper hands out."""
    return (
        isinstance(mask, torch.Tensor)
        and mask.dtype in (torch.int64, WHOLE_ROWS)
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
            or query.shape[2] != key.shape[2]
            or kwargs.get("is_causal") is False
            or not handle.shifts(module, attention_mask)
        ):
            if are_document_ids(attention_mask):
                # Of a model that was enabled when its mask was made.
                attention_mask = original_mask(attention_mask, module.config, query.dtype)
            return original(module, query, key, value, attention_mask, *args, **kwargs)
        return handle.attend(module, query, key, value, attention_mask, *args, **kwargs)

    return attention


def _mask_wrapper(original: Callable[..., Any]) -> Callable[..., Any]:
    # What a batch holds is read from tensors, and dynamo would compile anew for every one.
    @torch.compiler.disable
    def mask(*args: Any, **kwargs: Any) -> Any:
        found = None if args else _document_ids(kwargs)
        return original(*args, **kwargs) if found is None else found

    mask.original = original
    return mask


def _document_ids(given: dict[str, Any]) -> torch.Tensor | None:
    """[B, 1, 1, N] in place of the mask that a mask function was asked for; None: keep the mask."""
    config = given.get("config")
    if (
        config is None
        or given["q_length"] != given["kv_length"]
        or given.get("use_vmap")
        or limits_attention(given.get("local_size"), config)
    ):
        return None
    for handle in _enabled:
        trains, positions = handle.position_ids_of(config)
        if trains:
            break
    else:
        return None
    batch, length = given["batch_size"], given["q_length"]
    padding, device = given.get("attention_mask"), torch.device(given.get("device", "cpu"))
    rows = torch.zeros((), dtype=WHOLE_ROWS, device=device).expand(batch, 1, 1, length)
    if handle.is_sharded:
        return rows  # documents are those of the whole row, which layers ask for
    if positions is not None and positions.shape not in ((batch, length), (1, length)):
        positions = None
    if padding is None and positions is None and given["mask_function"] is plain_causal:
        return rows
    found = packing.read_mask(
        given["mask_function"],
        padding,
        batch=batch,
        length=length,
        device=device,
        position_ids=positions,
    )
    if found is None:
        return None
    ids, documents = found
    if documents.are_rows and positions is None:
        return rows
    handle.remember(ids := ids[:, None, None, :], documents)
    return ids


def original_mask(document_ids: torch.Tensor, config: Any, dtype: torch.dtype) -> Any:
    """The mask that [B, 1, 1, N] document ids stand for, as the model's own attention wants it."""
    ids = document_ids[:, 0, 0]
    plain = ids.dtype is WHOLE_ROWS

    def same_document(
        b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, kv: torch.Tensor
    ) -> torch.Tensor:
        return (kv <= q) & (ids[b, q] == ids[b, kv])

    function = ALL_MASK_ATTENTION_FUNCTIONS[config._attn_implementation]
    return getattr(function, "original", function)(
        batch_size=ids.shape[0],
        q_length=ids.shape[1],
        kv_length=ids.shape[1],
        mask_function=plain_causal if plain else same_document,
        attention_mask=None if plain else ids != packing.PADDING,
        allow_is_causal_skip=plain,
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

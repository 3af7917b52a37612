"""S²-Attn for a whole model: installed and removed as a pair, stock everywhere else.

transformers 5 passes every attention through two registries, one of attention functions and one
of mask functions. Both are wrapped while at least one model is enabled:

- the *mask* wrapper hands a covered model in training the documents of the batch, [B, 1, 1, N],
  instead of an N × N mask. It is an ordinary argument of the layers, so gradient checkpointing
  keeps it with the layer it belongs to;
- the *attention* wrapper computes S²-Attn for covered layers in training.

Names do not change: the model keeps its `attn_implementation`, and evaluation, generation and
every other model run the stock functions. A covered layer is causal, attends to the whole document
and goes through the registry. All others keep the stock path and are counted with the reason.
"""

from __future__ import annotations

import inspect
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any
from weakref import WeakSet

import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.masking_utils import causal_mask_function as plain_causal

from longlora_plugin.attention import documents as docs
from longlora_plugin.attention.backends import backend_for, check_group_size
from longlora_plugin.attention.layout import S2, AttentionPattern, head_runs

REGISTRY_NAME = "ALL_ATTENTION_FUNCTIONS"
_MARK = "_longlora_shifted_attention"
"""Attribute of a covered attention module: its `ShiftedAttention`."""

_enabled: list[ShiftedAttention] = []


class ShiftedAttention:
    """Handle of a model whose training uses S²-Attn.

    Attributes:
        group_size: tokens in a group.
        layers: number of attention layers covered.
        skipped: reason → number of attention layers that keep the stock path.
        active: False switches training back to the model's own attention, and True on again.
        calls: how often S²-Attn ran; 0 after a training step means that it never engaged.
    """

    def __init__(
        self,
        modules: list[torch.nn.Module],
        skipped: Counter[str],
        *,
        group_size: int,
        full_attention_below: int,
        pattern: AttentionPattern,
    ) -> None:
        self.group_size = group_size
        self.full_attention_below = full_attention_below
        self.pattern = pattern
        self.skipped = dict(skipped)
        self.active = True
        self.calls = 0
        self._modules = modules
        self._copies: WeakSet[torch.nn.Module] = WeakSet()
        self._documents: tuple[Any, Any, docs.Documents] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> ShiftedAttention:
        # A copied model shares the handle, as it shares `remove()`. `memo` holds the copies of
        # the modules that copy.deepcopy has begun, the one that carries this mark among them.
        known = [*self._modules, *self._copies]
        self._copies.update(memo[id(module)] for module in known if id(module) in memo)
        return self

    @property
    def layers(self) -> int:
        return len(self._modules)

    def remove(self) -> None:
        """Bring the stock behaviour back; a second call does nothing."""
        self.active = False
        for module in [*self._modules, *self._copies]:
            if module.__dict__.get(_MARK) is self:
                delattr(module, _MARK)
        if self in _enabled:
            _enabled.remove(self)
            if not _enabled:
                _unwrap_registries()

    def training(self, config: Any) -> bool:
        """Whether a model of this `config` is about to train with S²-Attn."""
        return self.active and any(
            module.training
            for module in [*self._modules, *self._copies]
            if getattr(module, "config", None) is config
        )

    def attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        position_bias: torch.Tensor | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """S²-Attn with the arguments of a transformers attention function.

        Args:
            query: [B, H, N, D]; key, value: [B, K, N, D].
            attention_mask: what the mask wrapper returned: [B, 1, 1, N] document ids, or None.

        Returns:
            ([B, N, H, D], None).
        """
        if position_bias is not None:
            raise ValueError(
                f"{type(module).__name__} adds a position bias to its attention scores, which "
                "shifted attention does not support; write longlora: {shifted_attention: false}"
            )
        implementation = module.config._attn_implementation
        if query.dtype == torch.float32 and "flash" in implementation:
            from transformers.integrations.flash_attention import get_target_dtype

            dtype = get_target_dtype(query, module)
            query, key, value = (x.to(dtype) for x in (query, key, value))
        self.calls += 1
        attend = backend_for(implementation)
        if implementation == "flex_attention":
            attend = _with(attend, module=module)
        out_BNHD = attend(
            query,
            key,
            value,
            documents=self._find_documents(query, attention_mask, position_ids, cu_seq_lens_q),
            runs=head_runs(self.pattern, query.shape[1], key.shape[1], self.group_size),
            group_size=self.group_size,
            full_attention_below=self.full_attention_below,
            scale=scaling,
            dropout=dropout,
            softcap=softcap,
            sinks_H=s_aux,
        )
        return out_BNHD.contiguous(), None

    def _find_documents(
        self,
        query: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        cu_seqlens: torch.Tensor | None,
    ) -> docs.Documents:
        batch, length = query.shape[0], query.shape[2]
        # Layers of one forward pass get the same objects: look once, not once a layer.
        given = (attention_mask, position_ids, cu_seqlens)
        versions = (batch, length, *[x if x is None else x._version for x in given])
        if self._documents is not None:
            known, known_versions, found = self._documents
            if versions == known_versions and all(
                a is b for a, b in zip(given, known, strict=True)
            ):
                return found
        if cu_seqlens is not None and batch == 1 and attention_mask is None:
            found = docs.from_boundaries(cu_seqlens, length)
        else:
            if position_ids is not None and (
                position_ids.dim() != 2 or position_ids.shape[-1] != length
            ):
                position_ids = None  # positions of images and the like say nothing of documents
            found = docs.from_ids(
                _ids_of(attention_mask, batch, length),
                position_ids,
                batch=batch,
                length=length,
            )
        self._documents = (given, versions, found)
        return found


def _with(function: Callable[..., Any], **fixed: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: function(*args, **fixed, **kwargs)


def _are_document_ids(mask: Any) -> bool:
    return isinstance(mask, torch.Tensor) and mask.dtype == torch.int64 and mask.dim() == 4


def _ids_of(mask: torch.Tensor | None, batch: int, length: int) -> torch.Tensor | None:
    if mask is None:
        return None
    if _are_document_ids(mask):
        return mask[:, 0, 0, :length].expand(batch, length)
    raise ValueError(
        f"shifted attention got a custom attention mask of shape {list(mask.shape)}; it needs "
        "plain causal attention. Pass a 2-D attention_mask for padding, position_ids that start "
        "anew for packed documents, or write longlora: {shifted_attention: false}"
    )


def enable_shifted_attention(
    model: torch.nn.Module,
    *,
    group_size: int,
    full_attention_below: int = 0,
    pattern: AttentionPattern = S2,
) -> ShiftedAttention:
    """Train `model` with S²-Attn; evaluation keeps the model's own attention.

    Args:
        model: any transformers decoder, also wrapped by PEFT.
        group_size: tokens in a group, even, at least 2 (the paper: a quarter of the length).
        full_attention_below: documents of up to this many tokens use full attention.
        pattern: who attends to whom.

    Returns:
        A handle: `.layers` covered, `.remove()`.

    Raises:
        ValueError: no layer is covered (says why), the model is already enabled, its attention
            implementation has no S² back end, or an argument is wrong.
    """
    check_group_size(group_size)
    if full_attention_below < 0:
        raise ValueError(f"full_attention_below must not be negative, got {full_attention_below}")
    covered, skipped = eligible_layers(model)
    if not covered:
        reasons = "; ".join(f"{count} × {reason}" for reason, count in skipped.items())
        raise ValueError(
            f"shifted attention covers no layer of {type(model).__name__}: "
            f"{reasons or 'it has no attention that goes through transformers attention interface'}"
        )
    if any(_MARK in module.__dict__ for module in covered):
        raise ValueError("shifted attention is already enabled on this model; remove() it first")
    for implementation in {module.config._attn_implementation for module in covered}:
        backend_for(implementation)
    handle = ShiftedAttention(
        covered,
        skipped,
        group_size=group_size,
        full_attention_below=full_attention_below,
        pattern=pattern,
    )
    for module in covered:
        setattr(module, _MARK, handle)
    _enabled.append(handle)
    _wrap_registries(covered)
    return handle


def eligible_layers(model: torch.nn.Module) -> tuple[list[torch.nn.Module], Counter[str]]:
    """Attention modules that S² may cover, and the reasons why others are not, counted."""
    covered: list[torch.nn.Module] = []
    skipped: Counter[str] = Counter()
    for module in attention_layers(model):
        reason = _why_not(module)
        if reason:
            skipped[reason] += 1
        else:
            covered.append(module)
    return covered, skipped


def attention_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """All attention modules of a transformers model, of whatever kind."""
    return [
        module
        for module in model.modules()
        if hasattr(module, "config")
        and (
            hasattr(module, "is_causal")
            or (hasattr(module, "layer_idx") and type(module).__name__.endswith("Attention"))
        )
    ]


def _uses_registry(module: torch.nn.Module) -> bool:
    forward = inspect.unwrap(type(module).forward)
    return REGISTRY_NAME in forward.__code__.co_names


def _why_not(module: torch.nn.Module) -> str | None:
    name, config = type(module).__name__, module.config
    if not _uses_registry(module):
        return f"{name} does not go through transformers' attention interface"
    if getattr(module, "is_causal", None) is not True:
        return f"{name} is not causal"
    if getattr(module, "is_cross_attention", False):
        return f"{name} is cross-attention"
    layer_types = getattr(config, "layer_types", None)
    index = getattr(module, "layer_idx", None)
    if layer_types and index is not None and index < len(layer_types):
        kind = layer_types[index]
        if kind not in ("full_attention", "attention"):
            return f"{name} is {kind.replace('_', ' ')}"
    window = getattr(module, "sliding_window", None)
    if window is None and not layer_types:
        window = getattr(config, "sliding_window", None)
    if _is_limiting(config, window):
        return f"{name} has a sliding window of {window} tokens"
    return None


def _is_limiting(config: Any, window: int | None) -> bool:
    longest = getattr(config, "max_position_embeddings", None)
    return bool(window) and (longest is None or window < longest)


def _is_for_limited_layers(config: Any, local_size: int | None) -> bool:
    """Whether a mask with a window or a chunk is for layers that S² does not cover.

    A mixed model makes one mask a kind of layer. Rows shorter than the window would look like
    full attention, so the mask function alone does not tell.
    """
    if local_size is None:
        return False
    return bool(getattr(config, "layer_types", None)) or _is_limiting(config, local_size)


# --- the registries -------------------------------------------------------------------------


def _attention_wrapper(stock: Callable[..., Any]) -> Callable[..., Any]:
    def attention(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        handle = module.__dict__.get(_MARK)
        if (
            handle is None
            or not handle.active
            or not module.training
            or query.shape[2] != key.shape[2]
            or kwargs.get("is_causal") is False
        ):
            if _are_document_ids(attention_mask):
                raise ValueError(
                    "some attention layers of this model are in training mode and others are not; "
                    "with padded or packed rows call model.train() or model.eval() on the whole"
                )
            return stock(module, query, key, value, attention_mask, *args, **kwargs)
        return handle.attend(module, query, key, value, attention_mask, *args, **kwargs)

    return attention


def _mask_wrapper(stock: Callable[..., Any]) -> Callable[..., Any]:
    def mask(*args: Any, **kwargs: Any) -> Any:
        config = kwargs.get("config")
        if (
            args
            or config is None
            or kwargs["q_length"] != kwargs["kv_length"]
            or kwargs.get("use_vmap")
            or _is_for_limited_layers(config, kwargs.get("local_size"))
            or not any(handle.training(config) for handle in _enabled)
        ):
            return stock(*args, **kwargs)
        padding = kwargs.get("attention_mask")
        if padding is not None and bool(padding.all()):
            padding = None
        if padding is None and kwargs["mask_function"] is plain_causal:
            return None
        ids = docs.ids_of_mask(
            kwargs["mask_function"],
            padding,
            batch=kwargs["batch_size"],
            length=kwargs["q_length"],
            device=kwargs.get("device", "cpu"),
        )
        return stock(**kwargs) if ids is None else ids[:, None, None, :]

    return mask


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
            stock = ALL_MASK_ATTENTION_FUNCTIONS[implementation]
            _wrapped_masks[implementation] = (
                stock if implementation in ALL_MASK_ATTENTION_FUNCTIONS._local_mapping else None
            )
            ALL_MASK_ATTENTION_FUNCTIONS[implementation] = _mask_wrapper(stock)


def _global_registry() -> Any:
    return sys.modules["transformers.modeling_utils"].ALL_ATTENTION_FUNCTIONS


def _wrap_attention_registry(registry: Any) -> None:
    stock = type(registry).get_interface

    def get_interface(implementation: str, default: Callable[..., Any]) -> Callable[..., Any]:
        return _attention_wrapper(stock(registry, implementation, default))

    registry.get_interface = get_interface
    _wrapped_attention.append(registry)


def _unwrap_registries() -> None:
    for registry in _wrapped_attention:
        del registry.get_interface
    _wrapped_attention.clear()
    for implementation, stock in _wrapped_masks.items():
        del ALL_MASK_ATTENTION_FUNCTIONS[implementation]
        if stock is not None:
            ALL_MASK_ATTENTION_FUNCTIONS[implementation] = stock
    _wrapped_masks.clear()

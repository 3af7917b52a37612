"""S²-Attn for a whole model: installed and removed as a pair, the original everywhere else.

`registries.py` sends the attention of covered layers here. The model keeps its
`attn_implementation`; evaluation, generation and every other model run the original functions. A
covered layer is causal, attends to the whole document and goes through the registry. All others
keep the original path and are counted with the reason.

Two kinds of forward hooks help: models note the `position_ids` they are called with, for the mask
function is not told of them where there is a padding mask or a cache; and a layer that keeps the
original path but shares a covered layer's mask gets its dense mask back.
"""

from __future__ import annotations

from collections import Counter
from typing import Any
from weakref import WeakSet

import torch
from transformers import PreTrainedModel

from longlora_plugin.attention import packing
from longlora_plugin.attention.backends import backend_for, check_settings
from longlora_plugin.attention.call import AttentionCall
from longlora_plugin.attention.eligibility import attention_layers, eligible_layers
from longlora_plugin.attention.layout import S2, AttentionPattern, head_runs
from longlora_plugin.attention.registries import (
    MARK,
    are_document_ids,
    disable,
    enable,
    enabled,
    original_mask,
)


class ShiftedAttention:
    """Handle of a model whose training uses S²-Attn.

    Attributes:
        group_size: tokens in a group.
        layers: number of attention layers covered.
        skipped: reason → number of attention layers that keep the original path.
        active: False switches training back to the model's own attention, and True on again.
        calls: how often S²-Attn ran; 0 after a training step means that it never engaged.
        position_ids: what the model now running was given, None between forward passes.
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
        self.position_ids: torch.Tensor | None = None
        self._modules = modules
        self._hooks: list[Any] = []
        self._dense_mask: tuple[torch.Tensor, Any] | None = None
        self._copies: WeakSet[torch.nn.Module] = WeakSet()
        self._documents: tuple[Any, Any, packing.Documents] | None = None

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
        """Bring the original behavior back; a second call does nothing."""
        self.active = False
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        disable(self, [*self._modules, *self._copies])

    def training(self, config: Any) -> bool:
        """Whether a model of this `config` is about to train with S²-Attn."""
        return self.active and any(
            module.training
            for module in [*self._modules, *self._copies]
            if getattr(module, "config", None) is config
        )

    def watch(self, model: torch.nn.Module) -> None:
        """Hook the model's position ids, and the masks of layers that keep the original path."""
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                self._hooks += [
                    module.register_forward_pre_hook(self._note_positions, with_kwargs=True),
                    module.register_forward_hook(self._forget_positions, always_call=True),
                ]
        for module in attention_layers(model):
            self._hooks.append(
                module.register_forward_pre_hook(self._give_dense_mask, with_kwargs=True)
            )

    def _note_positions(self, _: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        positions = kwargs.get("position_ids")
        # Positions of images and the like have another shape and say nothing of documents.
        if self.active and isinstance(positions, torch.Tensor) and positions.dim() == 2:
            self.position_ids = positions

    def _forget_positions(self, *_: Any) -> None:
        self.position_ids = None

    def _give_dense_mask(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self not in enabled():
            return None  # removed, but the hooks of copied models are still there
        if self.active and module.training and MARK in module.__dict__:
            return None
        given = [*args, *kwargs.values()]
        if not any(are_document_ids(x) for x in given):
            return None
        dtype = next(
            x.dtype for x in given if isinstance(x, torch.Tensor) and x.dtype.is_floating_point
        )

        def dense(x: Any) -> Any:
            if not are_document_ids(x):
                return x
            if self._dense_mask is None or self._dense_mask[0] is not x:
                self._dense_mask = (x, original_mask(x, module.config, dtype))
            return self._dense_mask[1]

        return tuple(dense(x) for x in args), {name: dense(x) for name, x in kwargs.items()}

    # Documents are Python numbers, and dynamo would compile anew for every batch's; the kernels
    # inside gain nothing from being compiled.
    @torch.compiler.disable
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
        call = AttentionCall(
            documents=self._find_documents(query, attention_mask, position_ids, cu_seq_lens_q),
            runs=head_runs(self.pattern, query.shape[1], key.shape[1], self.group_size),
            group_size=self.group_size,
            full_attention_below=self.full_attention_below,
            scale=scaling,
            dropout=dropout,
            softcap=softcap,
            sinks_H=s_aux,
            module=module,
        )
        out_BNHD = backend_for(implementation)(query, key, value, call)
        return out_BNHD.contiguous(), None

    def _find_documents(
        self,
        query: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        cu_seqlens: torch.Tensor | None,
    ) -> packing.Documents:
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
            found = packing.from_boundaries(cu_seqlens, length)
        else:
            if position_ids is not None and (
                position_ids.dim() != 2 or position_ids.shape[-1] != length
            ):
                position_ids = None  # positions of images and the like say nothing of documents
            found = packing.from_ids(
                _ids_of(attention_mask, batch, length),
                position_ids,
                batch=batch,
                length=length,
            )
        self._documents = (given, versions, found)
        return found


def _ids_of(mask: torch.Tensor | None, batch: int, length: int) -> torch.Tensor | None:
    if mask is None:
        return None
    if are_document_ids(mask):
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
    check_settings(group_size, full_attention_below)
    covered, skipped = eligible_layers(model)
    if not covered:
        reasons = "; ".join(f"{count} × {reason}" for reason, count in skipped.items())
        raise ValueError(
            f"shifted attention covers no layer of {type(model).__name__}: "
            f"{reasons or 'no attention of it goes through the interface of transformers'}"
        )
    if any(MARK in module.__dict__ for module in covered):
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
    handle.watch(model)
    enable(handle, covered)
    return handle

"""S²-Attn for a whole model: installed and removed as a pair, the original everywhere else.

`registries.py` sends the attention of covered layers here. The model keeps its
`attn_implementation`; evaluation, generation and every other model run the original functions. A
covered layer is causal, attends to the whole document and goes through the registry. All others
keep the original path and are counted with the reason.

Two kinds of forward hooks help: models note when a forward pass begins (`forwards.py`), whether it
trains and with which `position_ids`, for the mask function is not told of them where there is a
padding mask or a cache; and a layer that keeps the original path but shares a covered layer's mask
gets its dense mask back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from longlora_plugin.attention import packing, pose
from longlora_plugin.attention.backends import backend_for, check_settings
from longlora_plugin.attention.call import AttentionCall
from longlora_plugin.attention.eligibility import attention_layers, eligible_layers, told
from longlora_plugin.attention.forwards import Forward, Forwards, ReadDocuments
from longlora_plugin.attention.gather import Shards, shards_of
from longlora_plugin.attention.layout import S2, AttentionPattern, head_runs
from longlora_plugin.attention.registries import (
    MARK,
    WHOLE_ROWS,
    are_document_ids,
    disable,
    enable,
    original_mask,
)
from longlora_plugin.attention.shards import Exchange


class ShiftedAttention:
    """Handle of a model whose training uses S²-Attn.

    Attributes:
        group_size: tokens in a group.
        layers: number of attention layers covered.
        skipped: reason → number of attention layers that keep the original path.
        active: False switches training back to the model's own attention, and True on again.
        calls: how often S²-Attn ran; 0 after a training step means that it never engaged.
        follows: of a reference model: the handle of its policy. Its passes are those of training
            steps, so it runs as the policy would, whatever its own mode.
        precomputing: True while passes outside training mode stand for such ones of the steps.
    """

    def __init__(
        self,
        modules: list[torch.nn.Module],
        skipped: Counter[str],
        *,
        group_size: int,
        full_attention_below: int,
        pattern: AttentionPattern,
        shards: Shards | None = None,
    ) -> None:
        self.group_size = group_size
        self.full_attention_below = full_attention_below
        self.pattern = pattern
        self.skipped = dict(skipped)
        self.active = True
        self.calls = 0
        self.follows: ShiftedAttention | None = None
        self.precomputing = False
        self._modules = modules
        self._hooks: list[Any] = []
        self._copies: WeakSet[torch.nn.Module] = WeakSet()
        self._forwards = Forwards()
        self._shards = shards
        self._implementations = {module.config._attn_implementation for module in modules}

    def __deepcopy__(self, memo: dict[int, Any]) -> ShiftedAttention:
        # A copied model shares the handle, as it shares `remove()`. `memo` holds the copies of
        # the modules that copy.deepcopy has begun, the one that carries this mark among them.
        known = [*self._modules, *self._copies]
        self._copies.update(memo[id(module)] for module in known if id(module) in memo)
        return self

    @property
    def layers(self) -> int:
        return len(self._modules)

    @property
    def is_running(self) -> bool:
        """Whether a forward pass of the model runs in this thread."""
        return self._forwards.current is not None

    @property
    def is_sharded(self) -> bool:
        return self._shards is not None

    @property
    def exchange(self) -> Exchange | None:
        """Where processes share rows: what a layer exchanged in the first pass."""
        return None if self._shards is None else self._shards.exchange

    def share_rows(self, process_group: dist.ProcessGroup) -> None:
        """From now on a batch is a contiguous shard of rows that the group's processes share.

        The attention implementation is the one that the model had when it was enabled: what splits
        rows may have renamed it since.

        Raises:
            ValueError: this process is not in the group, or the pattern needs whole rows.
        """
        shards = Shards(process_group)
        self._shards = shards if shards.size > 1 else None
        pose.check_handle(self)

    def remove(self) -> None:
        """Bring the original behavior back; a second call does nothing."""
        self.active = False
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        disable(self, [*self._modules, *self._copies])

    def follow(self, policy: torch.nn.Module) -> None:
        """Follow a policy, also wrapped by PEFT or an accelerator; its own handle follows none."""
        marks = (module.__dict__.get(MARK) for module in policy.modules())
        handle = next((mark for mark in marks if mark is not None), None)
        self.follows = None if handle is self else handle
        pose.check_handle(self)

    def position_ids_of(self, config: Any) -> tuple[bool, torch.Tensor | None]:
        forward = self.training_pass(lambda module: getattr(module, "config", None) is config)
        return (False, None) if forward is None else (True, forward.position_ids)

    def training_pass(self, of: Callable[[torch.nn.Module], bool]) -> Forward | None:
        """The pass that runs, if it trains and a covered module for which `of` holds takes part."""
        forward = self._forwards.current
        if forward is None or not forward.trains or not self._is_on():
            return None
        takes_part = any(self._takes_part(m) for m in (*self._modules, *self._copies) if of(m))
        return forward if takes_part else None

    def shifts(self, module: torch.nn.Module, attention_mask: Any) -> bool:
        if not self._takes_part(module):
            return False
        if are_document_ids(attention_mask):
            return True
        # Otherwise of a layer alone, or of a mask that another package makes.
        forward = self._forwards.current
        return self._is_on() and (forward is None or forward.trains)

    def _is_on(self) -> bool:
        return self.active and (self.follows is None or self.follows.active)

    def _takes_part(self, module: torch.nn.Module) -> bool:
        policy = self.follows
        if policy is None:
            return self.precomputing or module.training
        return self.precomputing or any(each.training for each in policy._modules)

    def remember(self, document_ids: torch.Tensor, documents: packing.Documents) -> None:
        self._forwards.documents = ReadDocuments.of(document_ids, documents)

    def watch(self, model: torch.nn.Module, target_length: int | None = None) -> None:
        """Hook where forward passes begin, the masks of layers with the original attention and,
        for a pattern that skips positions, rotary embeddings.
        """
        if self.pattern.skips_positions:
            self._hooks += pose.hooks(self, model, target_length)
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                self._hooks += [
                    module.register_forward_pre_hook(self._begin, with_kwargs=True),
                    module.register_forward_hook(self._end, always_call=True),
                ]
        for module in attention_layers(model):
            self._hooks.append(
                module.register_forward_pre_hook(self._give_dense_mask, with_kwargs=True)
            )

    def _begin(self, module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._forwards.begin(module, args, kwargs)
        forward = self._forwards.current
        if self._shards is None or forward is None or forward.position_ids is None:
            return
        if not forward.position_ids.shape[1] and module.training and forward.trains and self.active:
            # Models fail on an empty shard before they reach a layer; others would wait for it.
            positions = forward.position_ids
            self._shards.gather_for_model(positions, forward.attention_mask, positions)

    def _end(self, module: torch.nn.Module, *_: Any) -> None:
        self._forwards.end(module)

    @torch.compiler.disable
    def _give_dense_mask(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if MARK in module.__dict__ and self._takes_part(module):
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
            known = self._forwards.dense_mask
            if known is None or known[0] is not x:
                known = (x, original_mask(x, module.config, dtype))
                self._forwards.dense_mask = known
            return known[1]

        return tuple(dense(x) for x in args), {name: dense(x) for name, x in kwargs.items()}

    # Documents are Python numbers, and dynamo would compile anew for every batch's; the kernels
    # inside gain nothing from being compiled.
    @torch.compiler.disable
    def attend(  # noqa: PLR0913  (the signature of transformers' attention interface)
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
            query, key, value: [B, H, N, D], [B, K, N, D].
            attention_mask: what the mask wrapper returned: [B, 1, 1, N] document ids, or None.

        Returns:
            ([B, N, H, D], None).
        """
        if position_bias is not None:
            raise ValueError(
                f"{type(module).__name__} adds a position bias to its attention scores, which "
                "shifted attention does not support; write longlora: {shifted_attention: false}"
            )
        implementation = self._implementation_of(module)
        if query.dtype == torch.float32 and "flash" in implementation:
            from transformers.integrations.flash_attention import get_target_dtype

            dtype = get_target_dtype(query, module)
            query, key, value = (x.to(dtype) for x in (query, key, value))
        self.calls += 1
        row = None
        if self._shards is None:
            documents = self._find_documents(query, attention_mask, position_ids, cu_seq_lens_q)
            pose.check_documents(self.pattern, self._forwards.current, documents)
        else:
            forward, tokens_BN = self._forwards.current, query[:, 0, :, 0]
            row = self._shards.row_of(forward, tokens_BN, attention_mask, position_ids)
            documents = row.local
        call = AttentionCall(
            documents=documents,
            runs=head_runs(self.pattern, query.shape[1], key.shape[1], self.group_size),
            group_size=self.group_size,
            full_attention_below=self.full_attention_below,
            scale=scaling,
            dropout=dropout,
            softcap=softcap,
            sinks_H=s_aux,
            module=module,
        )
        attend = backend_for(implementation)
        if self._shards is None or row is None:
            return attend(query, key, value, call).contiguous(), None
        return self._shards.attend(attend, query, key, value, call, row).contiguous(), None

    def _implementation_of(self, module: torch.nn.Module) -> str:
        if self._shards is not None and len(self._implementations) == 1:
            return next(iter(self._implementations))
        return module.config._attn_implementation

    def _find_documents(
        self,
        query: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        cu_seqlens: torch.Tensor | None,
    ) -> packing.Documents:
        batch, length = query.shape[0], query.shape[2]
        if attention_mask is not None and not are_document_ids(attention_mask):
            raise ValueError(
                f"shifted attention got a custom attention mask of shape "
                f"{list(attention_mask.shape)}; it needs plain causal attention. Pass a 2-D "
                "attention_mask for padding, position_ids that start anew for packed documents, or "
                "write longlora: {shifted_attention: false}"
            )
        listed = attention_mask is not None and attention_mask.dtype is not WHOLE_ROWS
        given: torch.Tensor | None
        if cu_seqlens is not None and batch == 1 and not listed:
            given = cu_seqlens
        elif attention_mask is None and position_ids is not None:
            # Positions of images and the like say nothing of documents.
            fits = position_ids.dim() == 2 and position_ids.shape[-1] == length
            given = position_ids if fits else None
        else:
            given = attention_mask if listed else None
        if given is None:
            return packing.whole_rows(batch, length)
        # Layers of one forward pass get the same objects: read them once, not once a layer.
        read = self._forwards.documents
        if read is not None and read.still_of(given):
            return read.documents
        if given is cu_seqlens:
            found = packing.from_boundaries(given, length)
        elif given.dim() == 4:
            ids = given[:, 0, 0, :length]
            found = packing.from_ids(ids, None, batch=batch, length=length)
        else:
            found = packing.from_ids(None, given, batch=batch, length=length)
        self._forwards.documents = ReadDocuments.of(given, found)
        return found


def enable_shifted_attention(
    model: torch.nn.Module,
    *,
    group_size: int,
    full_attention_below: int = 0,
    pattern: AttentionPattern = S2,
    follows: ShiftedAttention | None = None,
    process_group: dist.ProcessGroup | None = None,
    target_length: int | None = None,
) -> ShiftedAttention:
    """Train `model` with S²-Attn; evaluation and generation keep the model's own attention.

    Args:
        model: any transformers decoder, also wrapped by PEFT.
        group_size: tokens in a group, even, at least 2 (the paper: a quarter of the length).
        full_attention_below: documents of up to this many tokens use full attention.
        pattern: who attends to whom.
        follows: where `model` is the reference model of a policy: the policy's handle. A pass of
            it uses S²-Attn exactly where one of the policy would.
        process_group: processes that share each row, each with the same model, in training mode,
            on a contiguous shard, in the order of ranks, with its `position_ids` of the whole row.
            Passes that do not train attend inside the shard (docs: one row over several GPUs).
        target_length: of a pattern that skips positions: tokens that they reach to.

    Returns:
        A handle: `.layers` covered, `.remove()`.

    Raises:
        ValueError: no layer is covered (says why), the model is already enabled, its attention
            implementation has no S² back end, an argument is wrong, or a part of the model would
            take a shard for the row. In a pass, on all processes alike: shards do not fit.
    """
    check_settings(group_size, full_attention_below)
    covered, skipped = eligible_layers(model)
    if not covered:
        raise _nothing_covered(model, skipped)
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
        shards=shards_of(model, skipped, process_group),
    )
    handle.follows = follows
    handle.watch(model, target_length)
    enable(handle, covered)
    return handle


def _nothing_covered(model: torch.nn.Module, skipped: Counter[str]) -> ValueError:
    reasons = told(skipped)
    remedy = (
        "; write model_config: {sliding_window: null} to train and serve it without the window, "
        "or longlora: {shifted_attention: false}"
        if "sliding window" in reasons
        else ""
    )
    return ValueError(
        f"shifted attention covers no layer of {type(model).__name__}: "
        f"{reasons or 'no attention of it goes through the interface of transformers'}{remedy}"
    )

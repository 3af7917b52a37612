"""The forward pass that is running: whether it trains, and the positions it was given.

Decided once, where a forward pass enters the model, and for each thread apart. A pass trains unless
text is generated or a cache is filled or continued. Whether it records gradients says nothing:
reentrant checkpointing runs the layers first without them, and the passes that a policy's
log-probabilities are compared with (a reference with the adapter off, GRPO's old policy) must see
what the policy sees, or its first loss and ratios are not those of an unchanged policy.
"""

from __future__ import annotations

import inspect
import threading
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from longlora_plugin.attention import generation
from longlora_plugin.attention.packing import Documents
from longlora_plugin.attention.pose import Skipped
from longlora_plugin.attention.shards import Row


@dataclass
class Forward:
    """A forward pass of an enabled model.

    Attributes:
        model: the outermost module of it that was seen.
        trains: whether covered layers use S²-Attn if the model is in training mode.
        position_ids: [B, N] or [1, N] as given, or None.
        attention_mask: [B, N] as given, or None.
        row: where the batch is a shard: the row that it belongs to, once that is gathered.
        skipped: positions that skip, once a rotary embedding was called.
        entered: ids of the modules that have begun.
    """

    model: torch.nn.Module
    trains: bool
    position_ids: torch.Tensor | None = None
    attention_mask: torch.Tensor | None = None
    row: Row | None = None
    skipped: Skipped | None = None
    entered: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class ReadDocuments:
    """Documents, and the tensor that they were read from."""

    tensor: torch.Tensor
    version: int
    documents: Documents

    @classmethod
    def of(cls, tensor: torch.Tensor, documents: Documents) -> ReadDocuments:
        return cls(tensor, _version(tensor), documents)

    def still_of(self, tensor: torch.Tensor) -> bool:
        """Whether `tensor` is that very one, unchanged."""
        return tensor is self.tensor and _version(tensor) == self.version


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


class Forwards(threading.local):
    """Of one enabled model and of this thread: the forward passes that run, innermost last.

    Attributes:
        documents: those of the last batch.
        dense_mask: the document ids that a layer with the original attention was last given, and
            the mask it got instead.
    """

    def __init__(self) -> None:
        self.running: list[Forward] = []
        self.documents: ReadDocuments | None = None
        self.dense_mask: tuple[torch.Tensor, Any] | None = None

    @property
    def current(self) -> Forward | None:
        return self.running[-1] if self.running else None

    @torch.compiler.disable
    def begin(self, module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Before the forward of a transformers model, or of one inside another."""
        if len(args) > 1:
            named = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
            kwargs = {**kwargs, **named}
        current = self.current
        if current is None or id(module) in current.entered or not _holds(current.model, module):
            # A pass that left by an exception may still be here: nothing of it reaches this one.
            self.running = [forward for forward in self.running if forward.model is not module]
            self.running.append(Forward(module, _trains(module, kwargs)))
        current = self.running[-1]
        current.entered.add(id(module))
        # Positions of images and the like have another shape and say nothing of documents.
        positions, padding = (
            _rows(kwargs.get(name)) for name in ("position_ids", "attention_mask")
        )
        if positions is not None:
            current.position_ids = positions
        if positions is not None or current.attention_mask is None:
            current.attention_mask = padding

    @torch.compiler.disable
    def end(self, module: torch.nn.Module, *_: Any) -> None:
        """After it, also when an exception ends it."""
        if self.current is not None and self.current.model is module:
            self.running.pop()


def _rows(given: Any) -> torch.Tensor | None:
    return given if isinstance(given, torch.Tensor) and given.dim() == 2 else None


def _holds(model: torch.nn.Module, part: torch.nn.Module) -> bool:
    return any(module is part for module in model.modules())


def _trains(model: torch.nn.Module, given: dict[str, Any]) -> bool:
    if generation.is_running():
        return False
    # Models fill the default in themselves: a bare decoder may get it from its language model.
    asked = given.get("use_cache") is True and given.get("labels") is None
    generates = isinstance(model, PreTrainedModel) and model.can_generate()
    if given.get("past_key_values") is None and not (asked and generates):
        return True
    # While checkpointing, transformers drops the cache.
    return bool(getattr(model, "is_gradient_checkpointing", False))

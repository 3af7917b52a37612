"""Full-attention perplexity by position, measured while a model trains.

S²-Attn is on while training, so that the training loss does not say how the model does with the
full attention it will be used with (LongLoRA, arXiv 2309.12307, Table 6). Every N steps this
callback puts the model into evaluation mode, where S² is off, and scores held-out windows.

It also measures the base model before the first step, with the base model's own RoPE, and warns
when what is trained falls behind it at the base model's own context: an extension that forgets.

Shapes: W windows, L tokens each.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from longlora_plugin.evaluation.data import read_corpus
from longlora_plugin.evaluation.perplexity import BATCH_TOKENS, token_losses
from longlora_plugin.evaluation.windows import default_bucket_edges

LOG = logging.getLogger(__name__)
PREFIX = "long_context/perplexity"
WINDOWS = 8
"""Windows of a recipe's `held_out` text that are scored each time."""
READ_AT_MOST = 16
"""How many times the windows' tokens are read of a large text, to choose windows from."""
FUNCTION_KEPT = ("pissa", "olora", "corda", "lora_ga")
"""Initialisations that move a part of the base weights into the adapter: the model is still the
base while the adapter is on and untrained, and is something else with the adapter off."""
BASE_KEPT = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
"""Initialisations that leave the base weights alone: the base is the model with the adapter off."""
TOLERANCE = 0.1
"""How far above the base model's perplexity at its own context is too far: a share of it."""


def held_out_windows(documents: Sequence[Any], length: int, count: int, *, seed: int = 0) -> Tensor:
    """Windows spread over documents: int64 [at most count, length], never across two documents.

    Args:
        documents: token ids, one sequence a document.

    Raises:
        ValueError: no document is long enough.
    """
    starts = [
        (index, start)
        for index, document in enumerate(documents)
        for start in range(0, len(document) - length + 1, length)
    ]
    if not starts:
        longest = max(map(len, documents), default=0)
        raise ValueError(
            f"no held-out document has {length} tokens, the longest has {longest}; measure "
            "shorter windows, or give longer documents"
        )
    picked = np.random.default_rng(seed).permutation(len(starts))[:count]
    rows = [documents[starts[i][0]][starts[i][1] : starts[i][1] + length] for i in sorted(picked)]
    return torch.from_numpy(np.stack([np.asarray(row, dtype=np.int64) for row in rows]))


def watch_held_out(
    data: str, tokenizer: Any, *, length: int, **options: Any
) -> LongContextCallback:
    """The callback for a recipe's `held_out` text.

    Args:
        data: see `data.read_corpus`.
        length: tokens a window, of which there are `WINDOWS`.
        options: of `LongContextCallback`.

    Raises:
        ValueError: the text cannot be read, or no document is long enough.
    """
    corpus = read_corpus(data, tokenizer, max_tokens=READ_AT_MOST * length * WINDOWS)
    return LongContextCallback(held_out_windows(corpus.documents, length, WINDOWS), **options)


class LongContextCallback(TrainerCallback):
    """Logs perplexity by position every `every_steps` steps, and at the end.

    Logged names are `long_context/perplexity_<from>-<to>` (tokens seen), and
    `long_context/perplexity` for all positions.

    Args:
        windows: held-out token ids [W, L]; every process scores all of them.
        every_steps: optimizer steps between two measurements.
        log: receives a dict of figures, on every process: `trainer.log`.
        base_context: tokens of the base model's own context.
        base_config: transformers config of the base model, before RoPE was scaled; with it the
            base model is measured, without it the model as training starts.
        continues_adapter: whether training starts from an adapter that was trained before.
    """

    def __init__(
        self,
        windows: Tensor,
        *,
        every_steps: int,
        log: Callable[[dict[str, float]], None],
        base_context: int,
        base_config: Any = None,
        continues_adapter: bool = False,
    ) -> None:
        if every_steps < 1:
            raise ValueError(f"every_steps {every_steps}: write 1 or more")
        self.windows = windows
        self.every_steps = every_steps
        self.log = log
        self.base_config = base_config
        self.edges = default_bucket_edges(windows.shape[1], base_context)
        self.base_context = min(base_context, windows.shape[1])
        self.continues_adapter = continues_adapter
        self.base_perplexity: float | None = None
        self._warned = False
        self._measured_at = -1

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        trained = bool(state.global_step) or self.continues_adapter
        switched_off, reason = _base_with_adapter_off(model, trained)
        if reason is not None:
            LOG.warning("longlora: no comparison with the base model: %s", reason)
            return
        with contextlib.ExitStack() as stack:
            if switched_off:
                stack.enter_context(_same_trainable_parameters(model))
                stack.enter_context(model.disable_adapter())
            if self.base_config is not None:
                stack.enter_context(own_rope(model, self.base_config))
            losses = self._position_losses(model, args)
        self.base_perplexity = self._near_original(losses)
        self.log({"long_context/base_perplexity_at_original": self.base_perplexity})

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Loggers close their run at the end of training: what comes later opens another one.
        if state.global_step % self.every_steps == 0 or control.should_training_stop:
            self._measure(kwargs["model"], args, state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._measured_at != state.global_step:
            self._measure(kwargs["model"], args, state)

    def _measure(self, model: Any, args: Any, state: Any) -> None:
        self._measured_at = state.global_step
        losses = self._position_losses(model, args)
        figures = {PREFIX: math.exp(float(losses.mean()))}
        for low, high in zip(self.edges, self.edges[1:], strict=False):
            if len(part := losses[low:high]):
                figures[f"{PREFIX}_{low}-{high}"] = math.exp(float(part.mean()))
        self.log(figures)
        now = self._near_original(losses)
        base = self.base_perplexity
        if base is not None and now > base * (1 + TOLERANCE) and not self._warned:
            self._warned = True
            LOG.warning(
                f"longlora: step {state.global_step}: perplexity at {self.base_context} "
                f"tokens is {now:.2f}, {now / base - 1:.0%} above the base model's {base:.2f} "
                f"(more than {TOLERANCE:.0%}): the model is losing what it could do at its "
                f"own context. {self._advice(model)}"
            )

    @staticmethod
    def _advice(model: Any) -> str:
        from longlora_plugin.rope import rope_parameters_of

        parameters = rope_parameters_of(model.config)
        layers = [layer for layer in parameters.values() if isinstance(layer, dict)] or [parameters]
        if any(layer.get("rope_type") in ("linear", "dynamic") for layer in layers):
            return "Train longer, lower the learning rate, or try rope: yarn"
        return "Train longer, or lower the learning rate"

    def _near_original(self, losses: np.ndarray) -> float:
        """Perplexity of the second half of the base model's context."""
        return math.exp(float(losses[self.base_context // 2 : self.base_context].mean()))

    def _position_losses(self, model: nn.Module, args: Any) -> np.ndarray:
        """Mean loss after 1 … L − 1 tokens, in nats, [L − 1]."""
        device = next(model.parameters()).device
        # Parameters that are spread over processes are only gathered by the model's own forward.
        whole_logits = True if _is_sharded(model) else None
        batch = max(1, BATCH_TOKENS // self.windows.shape[1])
        total = np.zeros(self.windows.shape[1] - 1)
        with evaluation_mode(model), torch.no_grad(), _autocast(args, device):
            for ids in self.windows.split(batch):
                losses = token_losses(model, ids.to(device), whole_logits=whole_logits)
                total += losses.double().sum(0).cpu().numpy()
        return total / len(self.windows)


def _base_with_adapter_off(model: Any, trained: bool) -> tuple[bool, str | None]:
    """Whether the base model is this model with its adapter off, and why it cannot be had at all.

    Args:
        trained: whether the weights have moved since the base model was loaded.
    """
    if not hasattr(model, "disable_adapter"):
        return (
            False,
            "the full fine-tune was resumed, its first weights are gone" if trained else None,
        )
    kinds = {getattr(each, "init_lora_weights", True) for each in model.peft_config.values()}
    changed = sorted(str(kind) for kind in kinds if kind not in BASE_KEPT)
    if not changed:
        return True, None
    name = ", ".join(changed)
    if not all(kind.lower().startswith(FUNCTION_KEPT) for kind in changed):
        return False, f"the initialisation {name} changes the base weights"
    if trained:
        return False, (
            f"the initialisation {name} moved a part of the base weights into the adapter, which "
            "has been trained since"
        )
    return False, None


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def own_rope(model: nn.Module, base_config: Any) -> Iterator[None]:
    """Rotary embeddings of `base_config` for a while, in place of the model's scaled ones."""
    text = base_config.get_text_config()
    replaced = []
    for parent in model.modules():
        for name, child in parent.named_children():
            if type(child).__name__.endswith("RotaryEmbedding") and hasattr(child, "config"):
                replaced.append((parent, name, child))
    for parent, name, child in replaced:
        buffer = next(child.buffers(), None)
        device = None if buffer is None else buffer.device
        setattr(parent, name, type(child)(config=text).to(device))
    try:
        yield
    finally:
        for parent, name, child in replaced:
            setattr(parent, name, child)


@contextlib.contextmanager
def _same_trainable_parameters(model: nn.Module) -> Iterator[None]:
    """PEFT changes what is trainable when it switches adapters off and on; undo that."""
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, was in trainable:
            parameter.requires_grad_(was)


def _is_sharded(model: nn.Module) -> bool:
    """Whether ZeRO-3 or FSDP holds only a part of some parameter here."""
    return any(
        hasattr(parameter, "ds_id") or type(parameter.data).__name__ == "DTensor"
        for parameter in model.parameters()
    )


def _autocast(args: Any, device: torch.device) -> Any:
    """The precision that training computes in."""
    if getattr(args, "bf16", False):
        return torch.autocast(device.type, torch.bfloat16)
    if getattr(args, "fp16", False) and device.type != "cpu":
        return torch.autocast(device.type, torch.float16)
    return contextlib.nullcontext()

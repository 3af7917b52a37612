"""Which processes share a row, and what is wrong with their training without LongLoRA, too.

0.19 cuts rows in a forward hook of the trainer's model, later versions in the collator or in a hook
of ringmaster, and 0.21 under DeepSpeed in the data loader.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from packaging.specifiers import SpecifierSet
from torch.nn import functional

from longlora_plugin.host.compat import RecipeError

IGNORED = -100


def group_of_rows(*, deepspeed: bool) -> Any:
    """The process group of this process's rows; known once training begins."""
    if deepspeed:
        from deepspeed.utils import groups

        return groups._get_sequence_parallel_group()
    from axolotl.monkeypatch.ring_attn import get_ring_attn_group

    return get_ring_attn_group()


def check_padding(tokenizer: Any, *, packed: bool) -> None:
    """Raise RecipeError where rows are padded on the left: rows of a batch to the longest, and each
    to a multiple of 64 tokens.

    Attention over shards is told of no padding, and 0.20 and later stop at the first batch.
    """
    if not packed and getattr(tokenizer, "padding_side", "right") == "left":
        raise RecipeError(
            "context parallelism with a tokenizer that pads on the left, as Axolotl has Mistral's "
            "do with FlashAttention: attention over shards takes padding for text. Write "
            "sample_packing: true, or use a tokenizer that pads on the right"
        )


def weigh_targets(model: torch.nn.Module, processes: int) -> Callable[[], None]:
    """Make Axolotl 0.19's loss of shared rows the mean over the targets of the whole rows.

    It cuts labels before the model shifts them, which loses a target at each cut, and averages the
    means of the shards: a row whose first half is a masked prompt would count half. A hook in front
    of Axolotl's shifts the labels of whole rows; one behind it gives the model the number of
    targets to divide by. Gradients are averaged over processes, hence the division.

    Args:
        model: the trainer's, with Axolotl's hooks.
        processes: that share a row.

    Returns:
        Function that removes both hooks.

    Raises:
        RecipeError: the model's loss does not take what it needs.
    """
    decoder = model.get_base_model() if hasattr(model, "get_base_model") else model
    takes = inspect.signature(type(decoder).forward).parameters.values()
    if not any(each.kind is inspect.Parameter.VAR_KEYWORD for each in takes):
        raise RecipeError(
            f"context parallelism with {type(decoder).__name__}: its loss cannot be told how many "
            "targets the whole row has; use Axolotl 0.21, or remove context_parallel_size"
        )
    items: list[Any] = [None]

    def shift(
        module: torch.nn.Module, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        labels = kwargs.get("labels")
        if labels is None:
            return args, kwargs
        kwargs = dict(kwargs)
        given = kwargs.pop("num_items_in_batch", None)
        kwargs["labels"] = functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
        targets = (kwargs["labels"] != IGNORED).sum().clamp_min(1)
        items[0] = targets / processes if given is None else given
        return args, kwargs

    def weigh(
        module: torch.nn.Module, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        if kwargs.get("labels") is None:
            return args, kwargs
        given = {"num_items_in_batch": items[0]} if module.training else {}
        return args, {**kwargs, "shift_labels": kwargs["labels"], **given}

    hooks = [
        model.register_forward_pre_hook(shift, with_kwargs=True, prepend=True),
        model.register_forward_pre_hook(weigh, with_kwargs=True),
    ]

    def remove() -> None:
        for hook in hooks:
            hook.remove()

    return remove


def train_under_deepspeed(trainer: Any, processes: int) -> Callable[[], None]:
    """Make DeepSpeed's gradients of shared rows those of whole rows, and its rows the epoch's.

    Axolotl divides the loss by the processes that share a row, since ZeRO-1 and 2 sum their
    gradients; ZeRO-3's reduce-scatter averages them. And DeepSpeed's data loader wraps another that
    the trainer then tells neither its epoch nor how many rows a resumed run has trained.

    Args:
        trainer: Axolotl's, before it trains.
        processes: that share a row.

    Returns:
        Function that undoes both.

    Raises:
        RecipeError: what ZeRO-3 of this DeepSpeed does with gradients is not known.
    """
    import transformers.trainer
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPDataLoaderAdapter

    accelerator, skip = trainer.accelerator, transformers.trainer.skip_first_batches
    backward, share = accelerator.backward, accelerator.deepspeed_ulysses_dl_adapter

    def scaled_backward(loss: torch.Tensor, **options: Any) -> None:
        backward(loss * processes, **options)

    def shared(loader: Any, model: Any) -> Any:
        rows = share(loader, model)
        rows.set_epoch = partial(_begin_epoch, rows)
        return rows

    def skip_first_batches(rows: Any, count: int = 0) -> Any:
        if not isinstance(rows, UlyssesSPDataLoaderAdapter):
            return skip(rows, count)
        rows.trained = count  # dropped once the trainer has set the epoch
        return rows

    if accelerator.state.deepspeed_plugin.zero_stage == 3 and _zero3_averages():
        accelerator.backward = scaled_backward
    accelerator.deepspeed_ulysses_dl_adapter = shared
    transformers.trainer.skip_first_batches = skip_first_batches

    def undo() -> None:
        for name in ("backward", "deepspeed_ulysses_dl_adapter"):
            vars(accelerator).pop(name, None)
        transformers.trainer.skip_first_batches = skip

    return undo


def _begin_epoch(rows: Any, epoch: int) -> None:
    """`set_epoch` of DeepSpeed's data loader, which would go on where the last epoch ended."""
    sampler: Any = getattr(rows.dl.batch_sampler, "batch_sampler", None)  # of packed rows
    for each in (rows.dl, sampler):
        if hasattr(each, "set_epoch"):
            each.set_epoch(epoch)
    rows.iter = iter(rows.dl)
    rows.micro_batches.clear()
    for _ in range(vars(rows).pop("trained", 0)):
        next(rows)


def _zero3_averages() -> bool:
    """Whether ZeRO-3 averages the gradients of a shared row, as DeepSpeed 0.18.6 to 0.19.8 do.

    Raises:
        RecipeError: another DeepSpeed.
    """
    import deepspeed
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3 as ZeRO3

    version = deepspeed.__version__
    reduce_scatter = getattr(ZeRO3, "_DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads", None)
    known = SpecifierSet(">=0.18,<0.20").contains(version, prereleases=True)
    if not known or reduce_scatter is None:
        raise RecipeError(
            f"context parallelism under ZeRO-3 of DeepSpeed {version}: whether it sums or averages "
            "the gradients of a shared row is known of 0.18 and 0.19 alone; write deepspeed: and a "
            'file with "stage": 2, or fsdp_version: 2 and fsdp_config instead, or install '
            "deepspeed>=0.18.6,<0.20"
        )
    return "sequence_parallel_size" not in inspect.getsource(reduce_scatter)

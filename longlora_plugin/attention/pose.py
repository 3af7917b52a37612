"""Positions that skip: short segments train the positions of long rows (PoSE, arXiv 2309.10400).

A segment of G tokens alone has positions 0 … G − 1. PoSE cuts it in two at a random token and moves
what follows by a random number of positions, up to the end of the target length; over many steps
every distance occurs, at the attention's cost of short rows. Only the rotary embeddings of the
model are told. Masks and documents follow the positions that the model was given.

Shapes: B rows, N tokens a row, T real tokens of all rows.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from longlora_plugin.attention.eligibility import attention_layers, told
from longlora_plugin.attention.layout import AttentionPattern, segments
from longlora_plugin.attention.packing import PADDING, Documents, from_ids

INSIDE = (
    "attention_pattern: pose changes the positions that rotary embeddings are given, and {name} "
    "has them {where}; write attention_pattern: s2"
)
RECOMPUTED = "inside of its layers"


@dataclass(frozen=True)
class Skipped:
    """Positions of one forward pass.

    Attributes:
        given: [B, N] or [1, N], the positions of the model.
        position_ids: int64 [B, N], those that skip; 0 at padding.
        documents: whose segments they are of.
    """

    given: torch.Tensor
    position_ids: torch.Tensor
    documents: Documents


def generator_of_pass() -> torch.Generator:
    """Another one for each process and each pass, from one draw of torch's own generator.

    One draw, however many segments a process has: those of all processes stay in step, and a
    resumed run draws what it would have drawn.
    """
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    return torch.Generator().manual_seed(int(torch.randint(2**62, ())) + rank)


def skipped_positions(
    sizes: Sequence[int], target: int, generator: torch.Generator
) -> torch.Tensor:
    """Positions of segments that follow each other, int64 [T].

    Args:
        sizes: tokens of each segment.
        target: tokens that positions reach to; a longer segment skips none.
    """
    size = torch.tensor(sizes)
    cut_share, skip_share = torch.rand(2, len(sizes), generator=generator)
    cut = 1 + (cut_share * (size - 1)).long()
    skip = (skip_share * (target - size + 1).clamp(min=0)).long()
    place = torch.arange(int(size.sum())) - (size.cumsum(0) - size).repeat_interleave(size)
    return place + torch.where(
        place >= cut.repeat_interleave(size), skip.repeat_interleave(size), 0
    )


def skip(
    given: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    batch: int,
    group_size: int,
    full_attention_below: int,
    target: int,
) -> Skipped:
    """Positions that skip within the segments of every document.

    Args:
        given: [B, N] or [1, N], starting anew where a packed document starts.
        attention_mask: [B, N], 0 at padding; None where all tokens are real.

    Raises:
        ValueError: positions have another shape, such as those of images.
    """
    if given.dim() != 2:
        raise ValueError(
            f"attention_pattern: pose needs positions [batch, tokens], and the model has "
            f"{list(given.shape)}; write attention_pattern: s2"
        )
    length = given.shape[1]
    ids = None if attention_mask is None else torch.where(attention_mask.bool(), 0, PADDING)
    documents = from_ids(ids, given, batch=batch, length=length)
    cut = segments(documents.intervals, group_size, 0, full_attention_below)
    skipping = skipped_positions([size for _, size in cut], target, generator_of_pass())
    positions = torch.zeros(batch * length, dtype=torch.long)
    positions[slice(None) if documents.real is None else documents.real] = skipping
    return Skipped(given, positions.view(batch, length).to(given.device), documents)


def rotary_embeddings(model: torch.nn.Module, skipped: Mapping[str, int]) -> list[torch.nn.Module]:
    """The modules of a model that turn positions into angles.

    Args:
        skipped: reason → attention layers that no pattern covers.

    Raises:
        ValueError: there are none, some are inside of layers, which gradient checkpointing runs
            twice, or a layer would see skipped positions across segments.
    """
    name = type(model).__name__
    instead = "write attention_pattern: s2"
    if skipped:
        raise ValueError(
            f"attention_pattern: pose needs every layer of {name} to attend within segments, and "
            f"some do not: {told(skipped)}; {instead}"
        )
    found = [module for module in model.modules() if _takes_positions(module)]
    inside = {
        part
        for layer in model.modules()
        if isinstance(layer, GradientCheckpointingLayer)
        for part in layer.modules()
    }
    if not found or any(module in inside for module in found):
        raise ValueError(INSIDE.format(name=name, where=RECOMPUTED if found else "nowhere"))
    scaled = {
        type(layer).__name__ for layer in attention_layers(model) if _scales_by_position(layer)
    }
    if scaled:
        raise ValueError(
            f"attention_pattern: pose: {', '.join(sorted(scaled))} scales its scores by the "
            f"position as well, which is not changed; {instead}"
        )
    return found


def _scales_by_position(layer: torch.nn.Module) -> bool:
    code = inspect.unwrap(type(layer).forward).__code__
    return bool({"get_llama_4_attn_scale", "attn_temperature_tuning"} & set(code.co_names))


def _takes_positions(module: torch.nn.Module) -> bool:
    buffers = (name for name, _ in module.named_buffers(recurse=False))
    return any(name.endswith("inv_freq") for name in buffers) and (
        "position_ids" in inspect.signature(module.forward).parameters
    )


def hooks(handle: Any, model: torch.nn.Module, target: int | None) -> list[Any]:
    """Give the rotary embeddings of a model positions that skip, in passes that train.

    Args:
        handle: the model's `ShiftedAttention`.
        target: tokens that positions reach to.

    Raises:
        ValueError: the handle shares rows or follows a policy, or positions cannot skip.
    """
    if target is None:
        raise ValueError(f"the pattern {handle.pattern.name} needs target_length")
    check_handle(handle)

    @torch.compiler.disable
    def give(
        module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        forward = handle.training_pass(lambda covered: True)
        if forward is None:
            if handle.active and module.training and not handle.is_running:
                raise ValueError(INSIDE.format(name=type(module).__name__, where=RECOMPUTED))
            return None
        named = "position_ids" in kwargs
        given = kwargs["position_ids"] if named else args[1]
        if forward.skipped is None or forward.skipped.given is not given:
            forward.skipped = skip(
                given,
                forward.attention_mask,
                batch=args[0].shape[0],
                group_size=handle.group_size,
                full_attention_below=handle.full_attention_below,
                target=target,
            )
        positions = forward.skipped.position_ids
        if named:
            return args, {**kwargs, "position_ids": positions}
        return (args[0], positions, *args[2:]), kwargs

    found = rotary_embeddings(model, handle.skipped)
    return [module.register_forward_pre_hook(give, with_kwargs=True) for module in found]


def check_handle(handle: Any) -> None:
    """Raise ValueError where positions that skip would differ between models or processes."""
    if handle.pattern.skips_positions and (handle.is_sharded or handle.follows is not None):
        raise ValueError(
            f"the pattern {handle.pattern.name} needs whole rows of a model that no other one is "
            "compared with: no process_group and no follows"
        )


def check_documents(pattern: AttentionPattern, forward: Any, documents: Documents) -> None:
    """Raise ValueError where layers attend to other documents than those whose positions skip.

    Args:
        forward: the pass that runs; None where checkpointing runs a layer again, after it.
    """
    if not pattern.skips_positions or forward is None:
        return
    if forward.skipped is None or not forward.skipped.documents.are_those_of(documents):
        raise ValueError(
            f"attention_pattern: {pattern.name}: the layers attend to other documents than the "
            "model's positions and attention_mask have; write attention_pattern: s2"
        )

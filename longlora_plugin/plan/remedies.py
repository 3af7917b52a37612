"""What makes a run fit that does not: each remedy tried alone, then as few as it takes together.

A remedy is a key of Axolotl and what it changes of the memory model. They are tried in the order
of what they cost: first those that change nothing but the order of work, then those that take time
or CPU memory, then a quantized base, then more machines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from longlora_plugin.plan.memory import GIB, Memory, Training

MLP_TILE = 32768
"""Tokens of a tile of Axolotl's `tiled_mlp`."""
LAST = ("base", "context", "gpus")
"""Parts that cost precision or machines: added to others only where nothing else helps."""
WORTH_NAMING = 0.01
"""The least share of the memory that a remedy has to save."""


@dataclass(frozen=True)
class Remedy:
    """One change of a recipe.

    Attributes:
        part: what it is about; of two for the same part the later one counts.
        write: what to write into the recipe, or the command's option.
        costs: what it costs.
        changes: fields of Training and their values with it.
    """

    part: str
    write: str
    costs: str
    changes: dict[str, Any]


@dataclass(frozen=True)
class Tried:
    """What a remedy, or several together, come to.

    Attributes:
        write: what to write, one entry a remedy.
        costs: what each of them costs.
        needed: GiB of tensors on each GPU.
        fits: whether that fits.
    """

    write: tuple[str, ...]
    costs: tuple[str, ...]
    needed: float
    fits: bool


def remedies_for(run: Training, *, adapter: bool) -> Iterator[Remedy]:
    """Every remedy that a run does not use yet.

    Args:
        adapter: LoRA of some kind trains, not the base's own weights.
    """
    if run.micro_batch_size > 1:
        yield Remedy(
            "batch",
            f"micro_batch_size: 1, and gradient_accumulation_steps × {run.micro_batch_size}",
            "nothing but a little time",
            {"micro_batch_size": 1},
        )
    if run.loss == "full":
        yield Remedy(
            "loss", "chunked_cross_entropy: true", "nothing", {"loss": "chunked", "loss_chunks": 8}
        )
    if run.loss != "fused":
        yield Remedy(
            "loss",
            "liger_fused_linear_cross_entropy: true, plugin axolotl.integrations.liger.LigerPlugin",
            "nothing; instead of chunked_cross_entropy",
            {"loss": "fused"},
        )
    if not run.checkpointing and not run.offload_activations:
        yield Remedy(
            "activations",
            "gradient_checkpointing: true",
            "the layers' forward pass once more",
            {"checkpointing": True},
        )
    if run.mlp_tiles == 1 and run.tokens > MLP_TILE and run.engine != "fsdp":  # crashes there
        yield Remedy(
            "mlp",
            "tiled_mlp: true",
            "the FFN's forward pass once more; needs the package deepspeed",
            {"mlp_tiles": -(-run.tokens // MLP_TILE)},
        )
    if not run.offload_activations:
        yield Remedy(
            "activations",
            "gradient_checkpointing: true, activation_offloading: hidden_states",
            "CPU memory for the inputs of all layers",
            {"checkpointing": True, "offload_activations": True},
        )
    yield from _for_weights(run, adapter)
    yield from _for_machines(run)


def _for_weights(run: Training, adapter: bool) -> Iterator[Remedy]:
    if run.optimizer in ("adam", "adamw") and not adapter:
        yield Remedy(
            "optimizer",
            "optimizer: adamw_bnb_8bit",
            "the precision of the optimizer's states",
            {"optimizer": "adamw_8bit"},
        )
    if run.gpus > 1 and run.engine != "fsdp" and run.zero_stage < 3:
        yield Remedy(
            "weights",
            "deepspeed: a file with ZeRO-3, such as deepspeed_configs/zero3_bf16.json",
            "every layer's weights are gathered twice a step",
            {"engine": "deepspeed", "zero_stage": 3, "bucket_elements": None, "buckets": 1},
        )
    if adapter and run.engine == "ddp" and not run.offload_layers:
        yield Remedy(
            "weights",
            "layer_offloading: true",
            "the frozen weights cross PCIe twice a step",
            {"offload_layers": True},
        )
    if adapter and run.quantization is None and run.compute_bytes == 2:
        yield Remedy(
            "base",
            "load_in_4bit: true",
            "a base rounded to 4 bits, and time to unpack it",
            {"quantization": "nf4"},
        )


def _for_machines(run: Training) -> Iterator[Remedy]:
    for count in (2, 4, 8):
        if run.context_parallel < count <= run.gpus and run.gpus % count == 0:
            yield Remedy(
                "context",
                f"context_parallel_size: {count}",
                f"{count} GPUs share a row: fewer rows at once, traffic in every layer, and full "
                "attention (longlora: {shifted_attention: false})",
                {"context_parallel": count},
            )
    for times in (2, 4):
        if run.engine != "ddp" and run.zero_stage > 0:
            yield Remedy(
                "gpus", f"--gpus {run.gpus * times}", "more GPUs", {"gpus": run.gpus * times}
            )


def remedies(
    run: Training, memory_of: Callable[[Training], Memory], available: float, *, adapter: bool
) -> tuple[list[Tried], Tried | None]:
    """(each remedy alone, as few as make the run fit together).

    The second is None where one alone does that costs neither precision nor machines, or where all
    together do not.

    Args:
        run: what does not fit.
        memory_of: the memory of a changed run.
        available: bytes of a GPU.
    """

    def with_(chosen: Sequence[Remedy]) -> Training:
        changed = run
        for each in chosen:
            changed = replace(changed, **each.changes)
        return changed

    def needed(chosen: Sequence[Remedy]) -> float:
        return memory_of(with_(chosen)).needed

    def helping(chosen: Sequence[Remedy]) -> list[Remedy]:
        worth = (1 - WORTH_NAMING) * needed(chosen)
        offered = remedies_for(with_(chosen), adapter=adapter)
        return [each for each in offered if needed([*chosen, each]) < worth]

    def tried(chosen: Sequence[Remedy]) -> Tried:
        need = needed(chosen)
        return Tried(
            tuple(each.write for each in chosen),
            tuple(each.costs for each in chosen),
            need / GIB,
            need <= available,
        )

    first = helping([])
    alone = [tried([each]) for each in first]
    if any(now.fits and each.part not in LAST for now, each in zip(alone, first, strict=True)):
        return alone, None
    chosen: list[Remedy] = []
    while needed(chosen) > available:
        offered = helping(chosen)
        if not offered:
            return alone, None
        offered = [each for each in offered if each.part not in LAST] or offered
        enough = (each for each in offered if needed([*chosen, each]) <= available)
        pick = next(enough, offered[0])
        chosen = [*(each for each in chosen if each.part != pick.part), pick]
    for each in tuple(chosen):
        others = [other for other in chosen if other is not each]
        if others and needed(others) <= available:
            chosen = others
    return alone, tried(chosen)

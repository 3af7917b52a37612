"""The plan of one recipe: what it trains, costs and needs, and how far a GPU takes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from longlora_plugin.attention.layout import AttentionPattern
from longlora_plugin.plan.flops import forward_flops, step_flops
from longlora_plugin.plan.from_recipe import (
    attention_of,
    parameters_of,
    training_of,
    uses_own_attention,
    uses_shifted_attention,
)
from longlora_plugin.plan.gpus import GPUS, Gpu, find_gpu
from longlora_plugin.plan.memory import GIB, Memory, Training, memory
from longlora_plugin.plan.parameters import Parameters
from longlora_plugin.plan.shape import ModelShape, meta_model, shape_of
from longlora_plugin.run.prepare import prepare_run
from longlora_plugin.run.recipe import Recipe

STEP = 256
"""The largest length is found to this many tokens."""
LONGEST = 2**26


@dataclass(frozen=True)
class Run:
    """A recipe as plain numbers; asks nothing of transformers any more."""

    shape: ModelShape
    parameters: Parameters
    training: Training
    notes: tuple[str, ...]
    group_size_for: Callable[[int], int]
    pattern: AttentionPattern
    full_attention_below: int
    full_steps_share: float
    stores_scores: bool
    own_attention: bool

    def memory_at(self, length: int) -> Memory:
        """Memory on each GPU with rows of `length` tokens."""
        width = 0
        if self.stores_scores:
            width = length if self.own_attention else self.group_at(length) or length
        training = replace(self.training, sequence_len=length, scores_width=width)
        return memory(self.shape, self.parameters, training)

    def group_at(self, length: int) -> int | None:
        """Tokens in a group; None where documents so short use full attention."""
        return None if length <= self.full_attention_below else self.group_size_for(length)

    def forward_at(self, length: int, group_size: int | None) -> dict[str, float]:
        """TFLOPs of a forward pass over one row, counted densely as in Table 11."""
        return forward_flops(self.shape, length, group_size, pattern=self.pattern).tera()

    def step_at(self, length: int, group_size: int | None) -> dict[str, float]:
        """TFLOPs of a training step over one row, causal pairs only."""
        return step_flops(
            self.shape,
            length,
            group_size,
            trains_base=self.parameters.trained_base > 0,
            lora_weights=self.parameters.lora,
            checkpointing=self.training.checkpointing,
            flash=not self.stores_scores,
            pattern=self.pattern,
        ).tera()


@dataclass(frozen=True)
class OnGpu:
    """How a run does on one kind of GPU.

    Attributes:
        gpu: its name.
        fits: `needed` fits.
        tight: it fits, `total` does not: whether it runs is up to the allocator.
        largest_sequence_len: the longest row that fits, in tokens; 0 where none does.
        comfortable_sequence_len: the longest whose `total` fits.
    """

    gpu: str
    fits: bool
    tight: bool
    largest_sequence_len: int
    comfortable_sequence_len: int


@dataclass(frozen=True)
class Plan:
    """What a recipe costs. FLOPs in 10¹², memory in GiB on each GPU, lengths in tokens.

    Attributes:
        group_size: tokens in a group of S²; None where the recipe's rows use full attention.
        shifted_attention: the recipe trains with S²; `s2` and `speedup` say what it is worth
            either way.
        parameters: `trained` and `frozen`; `base`, `lora` and `copies` are parts of them.
        flops: a forward pass over one row, `full` and `s2`, by part; dense count (Table 11).
        step: a training step over one row, `full` and `s2`, by part; causal count.
        speedup: full over S² of `step`: what to expect of a step that arithmetic sets the pace of.
        speedup_run: the same over a run whose last `full_attention_steps` use full attention.
        memory: by part; `total` is what nvidia-smi shows, `needed` what must fit.
        fits, tight, largest_sequence_len, comfortable_sequence_len: as in OnGpu, on the GPU that
            was named, else None.
        by_gpu: the same for every known GPU where none was named.
        notes: what had to be assumed.
    """

    base_model: str
    adapter: str | None
    sequence_len: int
    group_size: int | None
    shifted_attention: bool
    parameters: dict[str, int]
    flops: dict[str, dict[str, float]]
    step: dict[str, dict[str, float]]
    speedup: float
    speedup_run: float
    memory: dict[str, float]
    gpus: int
    gpu: str | None
    gpu_memory: float | None
    fits: bool | None
    tight: bool | None
    largest_sequence_len: int | None
    comfortable_sequence_len: int | None
    by_gpu: tuple[OnGpu, ...]
    notes: tuple[str, ...]


def planned_run(recipe: Recipe, config: Any, gpus: int = 1) -> Run:
    """Read off a recipe and its base model's transformers config what bears on cost.

    Raises:
        ValueError: `gpus` is below 1, or the recipe has a value that cannot be planned with.
    """
    from longlora_plugin.registry import find

    if gpus < 1:
        raise ValueError(f"--gpus: got {gpus}; write the number of GPUs, at least 1")
    run = prepare_run(recipe.raw, config).checked()
    model = meta_model(
        run.config_of(config), trust_remote_code=recipe.raw.get("trust_remote_code") is True
    )
    block = run.block
    training, notes = training_of(recipe, gpus)
    share = block.full_attention_steps
    steps = recipe.raw.get("max_steps")
    if share >= 1:
        share = min(1.0, share / int(steps)) if steps else 0.0
        if not steps:
            notes += ("full_attention_steps is left out of speedup_run: max_steps is not set",)
    return Run(
        shape=shape_of(model),
        parameters=parameters_of(recipe, model),
        training=training,
        notes=notes,
        # Lengths below a fixed group are asked for by pictures only: one group holds them.
        group_size_for=lambda length: block.group_size_for(max(length, block.group_size or 0)),
        pattern=find(
            "longlora_attention_patterns", block.attention_pattern, what="attention pattern"
        ),
        full_attention_below=block.full_attention_below,
        full_steps_share=share,
        stores_scores=attention_of(recipe) == "eager",
        own_attention=uses_own_attention(recipe),
    )


def fits(plan: Memory, gpu: Gpu) -> bool:
    """Whether a run fits a GPU; tight where `total` does not."""
    return plan.needed <= gpu.memory * GIB


def largest_sequence_len(run: Run, gpu: Gpu, *, comfortably: bool = False) -> int:
    """The largest multiple of STEP tokens that fits, by bisection; 0 where not even one does.

    Args:
        comfortably: with room for what the allocator fragments.
    """

    def enough(steps: int) -> bool:
        plan = run.memory_at(steps * STEP)
        return plan.total <= gpu.memory * GIB if comfortably else fits(plan, gpu)

    low, high = 0, 1
    while high * STEP < LONGEST and enough(high):
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        if enough(middle):
            low = middle
        else:
            high = middle
    return low * STEP


def _on(run: Run, need: Memory, gpu: Gpu) -> OnGpu:
    return OnGpu(
        gpu=gpu.name,
        fits=fits(need, gpu),
        tight=fits(need, gpu) and need.total > gpu.memory * GIB,
        largest_sequence_len=largest_sequence_len(run, gpu),
        comfortable_sequence_len=largest_sequence_len(run, gpu, comfortably=True),
    )


def plan_recipe(recipe: Recipe, config: Any, gpu: str | None = None, gpus: int = 1) -> Plan:
    """Plan a recipe.

    Args:
        recipe: as `read_recipe` gives it.
        config: the base model's transformers config.
        gpu: a name of GPUS or a size (`48gb`); None plans for every known GPU.
        gpus: GPUS of the run, all data-parallel.

    Raises:
        ValueError: an unknown GPU, or a value of the recipe that cannot be planned with.
    """
    card = find_gpu(gpu) if gpu else None
    return plan_run(recipe, planned_run(recipe, config, gpus), card)


def plan_run(recipe: Recipe, run: Run, card: Gpu | None) -> Plan:
    """The plan of a prepared recipe on a GPU."""
    length = recipe.sequence_len
    group = run.group_at(length)
    step = {"full": run.step_at(length, None), "s2": run.step_at(length, group)}
    need = run.memory_at(length)
    share = run.full_steps_share
    full, sparse = step["full"]["total"], step["s2"]["total"]
    counts = run.parameters
    here = _on(run, need, card) if card else None
    return Plan(
        base_model=recipe.base_model,
        adapter=recipe.adapter,
        sequence_len=length,
        group_size=group,
        shifted_attention=uses_shifted_attention(recipe),
        parameters={
            "trained": counts.trained,
            "frozen": counts.frozen,
            "base": counts.base,
            "lora": counts.lora,
            "copies": counts.copies,
        },
        flops={"full": run.forward_at(length, None), "s2": run.forward_at(length, group)},
        step=step,
        speedup=full / sparse,
        speedup_run=full / (share * full + (1 - share) * sparse),
        memory=need.gib(),
        gpus=run.training.gpus,
        gpu=card.name if card else None,
        gpu_memory=card.memory if card else None,
        fits=here.fits if here else None,
        tight=here.tight if here else None,
        largest_sequence_len=here.largest_sequence_len if here else None,
        comfortable_sequence_len=here.comfortable_sequence_len if here else None,
        by_gpu=() if card else tuple(_on(run, need, known) for known in GPUS.values()),
        notes=run.notes,
    )

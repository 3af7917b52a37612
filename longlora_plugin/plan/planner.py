"""The plan of one recipe: what it trains, costs and needs, and how far a GPU takes it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from longlora_plugin.args import LongLoRAConfig
from longlora_plugin.attention.layout import AttentionPattern
from longlora_plugin.plan.cost import Cost, Rate, Steps, cost_of, flops_share_of
from longlora_plugin.plan.flops import StepKind, forward_flops, step_flops
from longlora_plugin.plan.from_recipe import (
    attention_of,
    model_of,
    parameters_of,
    steps_of,
    training_of,
    uses_own_attention,
    uses_shifted_attention,
)
from longlora_plugin.plan.gpus import GPUS, Gpu
from longlora_plugin.plan.memory import GIB, Memory, Training, host_memory, memory
from longlora_plugin.plan.parallel import bytes_sent
from longlora_plugin.plan.parameters import Parameters
from longlora_plugin.plan.remedies import Tried, remedies
from longlora_plugin.plan.shape import ModelShape, shape_of
from longlora_plugin.run.context_parallel import group_warning
from longlora_plugin.run.recipe import Recipe

STEP = 256
"""The largest length is found to this many tokens."""
LONGEST = 2**26
PARAMETERS = ("trained", "frozen", "base", "lora", "copies")
ON_GPU = ("fits", "tight", "largest_sequence_len", "comfortable_sequence_len")


@dataclass(frozen=True)
class Run:
    """A recipe as plain numbers; asks nothing of transformers any more."""

    shape: ModelShape
    parameters: Parameters
    training: Training
    steps: Steps
    notes: tuple[str, ...]
    block: LongLoRAConfig
    pattern: AttentionPattern
    full_steps_share: float
    stores_scores: bool
    own_attention: bool

    @property
    def adapter(self) -> bool:
        """Something is trained in addition to the base, which is frozen."""
        return self.parameters.trained_base == 0

    def memory_at(self, length: int) -> Memory:
        """Memory on each GPU with rows of `length` tokens."""
        return self.memory_of(replace(self.training, sequence_len=length))

    def memory_of(self, training: Training) -> Memory:
        """Memory on each GPU of this run with another training."""
        length, width = training.sequence_len, 0
        if self.stores_scores:
            width = length if self.own_attention else self.group_at(length) or length
        return memory(self.shape, self.parameters, replace(training, scores_width=width))

    def group_at(self, length: int) -> int | None:
        """Tokens in a group; None where documents so short use full attention."""
        if length <= self.block.full_attention_below:
            return None
        # Lengths below a fixed group are asked for by pictures only: one group holds them.
        return self.block.group_size_for(max(length, self.block.group_size or 0))

    def sent_at(self, length: int, group_size: int | None) -> dict[str, int] | None:
        """Bytes a layer sends in its forward pass: `halo`, `ring`, `ulysses`."""
        training = self.training
        if training.context_parallel == 1:
            return None
        return bytes_sent(
            self.shape,
            length,
            training.context_parallel,
            group_size,
            pattern=self.pattern,
            bytes_each=training.compute_bytes,
        )

    def forward_at(self, length: int, group_size: int | None) -> dict[str, float]:
        """TFLOPs of a forward pass over one row, counted densely as in Table 11."""
        return forward_flops(self.shape, length, group_size, pattern=self.pattern).tera()

    def step_at(self, length: int, group_size: int | None) -> dict[str, float]:
        """TFLOPs of a training step over one row, causal pairs only."""
        return step_flops(
            self.shape,
            length,
            group_size,
            StepKind(
                trains_base=self.parameters.trained_base > 0,
                lora_weights=self.parameters.lora,
                checkpointing=self.training.checkpointing,
                flash=not self.stores_scores,
                tiled_mlp=self.training.mlp_tiles > 1,
            ),
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
        base_model, adapter, sequence_len: the recipe's.
        group_size: tokens in a group of S²; None where the recipe's rows use full attention.
        shifted_attention: the recipe trains with S²; `s2` and `speedup` say what it is worth
            either way.
        parameters: `trained` and `frozen`; `base`, `lora` and `copies` are parts of them.
        flops: a forward pass over one row, `full` and `s2`, by part; dense count (Table 11).
        step: a training step over one row, `full` and `s2`, by part; causal count.
        speedup: full over S² of `step`: what to expect of a step that arithmetic sets the pace of.
        speedup_run: the same over a run whose last `full_attention_steps` use full attention.
        memory: by part; `total` is what nvidia-smi shows, `needed` what must fit.
        host_memory: CPU memory of one GPU's process for what it moves off the GPU.
        gpus: of the run.
        gpu, gpu_memory: the GPU that was named, and its GiB.
        fits, tight, largest_sequence_len, comfortable_sequence_len: as in OnGpu, on the GPU that
            was named, else None.
        by_gpu: the same for every known GPU where none was named.
        cost: time and money on the GPU that was named; None where its speed is not known.
        context_parallel: GPUs that share a row.
        sent: bytes a layer's forward pass sends between them: `halo` (S²), `ring`, `ulysses`.
        remedies: where the run does not fit, what each change alone comes to.
        together: where no change alone makes it fit, the few that do.
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
    host_memory: float
    gpus: int
    gpu: str | None
    gpu_memory: float | None
    fits: bool | None
    tight: bool | None
    largest_sequence_len: int | None
    comfortable_sequence_len: int | None
    by_gpu: tuple[OnGpu, ...]
    cost: Cost | None
    context_parallel: int
    sent: dict[str, int] | None
    remedies: tuple[Tried, ...]
    together: Tried | None
    notes: tuple[str, ...]


def planned_run(recipe: Recipe, config: Any, gpus: int = 1, rows: int | None = None) -> Run:
    """Read off a recipe and its base model's transformers config what bears on cost.

    Args:
        gpus: GPUs of the run.
        rows: rows of `sequence_len` tokens of the dataset, where they are known.

    Raises:
        ValueError: the recipe has a value that cannot be planned with.
    """
    from longlora_plugin.registry import find

    prepared, model = model_of(recipe, config)
    block = prepared.block
    shape = shape_of(model)
    training, notes = training_of(recipe, gpus, shape)
    steps = steps_of(recipe, training, rows)
    share = block.full_attention_steps
    if share >= 1:
        share = min(1.0, share / steps.count)
        if steps.assumed:
            notes += (f"full_attention_steps: {block.full_attention_steps:g} of {steps.why}",)
    if uses_shifted_attention(recipe) and training.context_parallel > 1:
        group = block.group_size_for(recipe.sequence_len)
        about = group_warning(group, recipe.sequence_len, training.context_parallel)
        notes += (about,) if about else ()
    if training.context_parallel > 1:
        notes += (
            "context parallelism: hours count arithmetic alone, on equal parts of a row; what GPUs "
            "send each other is not in them, and nobody measured it",
        )
    return Run(
        shape=shape,
        parameters=parameters_of(prepared, model),
        training=training,
        steps=steps,
        notes=notes,
        block=block,
        pattern=find("longlora_attention_patterns", block.attention_pattern),
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
        comfortably: with space for what the allocator fragments.
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


def _remedies(run: Run, need: Memory, card: Gpu | None) -> tuple[tuple[Tried, ...], Tried | None]:
    if card is None or fits(need, card):
        return (), None
    available = card.memory * GIB
    alone, together = remedies(run.training, run.memory_of, available, adapter=run.adapter)
    return tuple(alone), together


def plan_run(
    recipe: Recipe,
    run: Run,
    card: Gpu | None,
    *,
    flops_share: float | None = None,
    price_per_gpu_hour: float | None = None,
) -> Plan:
    """The plan of a prepared recipe on a GPU.

    Args:
        flops_share: of the GPU's peak; None: what was measured on such a GPU, else the default.
        price_per_gpu_hour: as in `Rate`.
    """
    length = recipe.sequence_len
    group = run.group_at(length)
    step = {"full": run.step_at(length, None), "s2": run.step_at(length, group)}
    need = run.memory_at(length)
    share = run.full_steps_share
    full, sparse = step["full"]["total"], step["s2"]["total"]
    counts = run.parameters
    here = _on(run, need, card) if card else None
    shifted = uses_shifted_attention(recipe)
    cost = None
    if card and card.tflops:
        reached, origin = flops_share_of(card.name, flops_share)
        cost = cost_of(
            run.steps,
            Rate(run.training.gpus, card.tflops, reached, price_per_gpu_hour, origin),
            {kind: counted["total"] for kind, counted in step.items()},
            sequence_len=length,
            full_share=share if shifted else 1.0,
        )
    alone, together = _remedies(run, need, card)
    return Plan(
        base_model=recipe.base_model,
        adapter=recipe.adapter,
        sequence_len=length,
        group_size=group,
        shifted_attention=shifted,
        parameters={name: getattr(counts, name) for name in PARAMETERS},
        flops={"full": run.forward_at(length, None), "s2": run.forward_at(length, group)},
        step=step,
        speedup=full / sparse,
        speedup_run=full / (share * full + (1 - share) * sparse),
        memory=need.gib(),
        host_memory=host_memory(run.shape, counts, run.training) / GIB,
        gpus=run.training.gpus,
        gpu=card.name if card else None,
        gpu_memory=card.memory if card else None,
        **{name: getattr(here, name, None) for name in ON_GPU},
        by_gpu=() if card else tuple(_on(run, need, known) for known in GPUS.values()),
        cost=cost,
        context_parallel=run.training.context_parallel,
        sent=run.sent_at(length, group),
        remedies=alone,
        together=together,
        notes=run.notes,
    )

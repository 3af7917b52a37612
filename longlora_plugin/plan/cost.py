"""Hours, GPU-hours and money of a run, from its FLOPs and an assumed share of the GPU's peak.

A step works on `data_parallel · micro_batch_size · gradient_accumulation_steps` rows, each GPU on
its part; its time is the causal FLOPs of that part over `flops_share` of the data sheet's bf16
rate. Every row is counted as full (`sequence_len` tokens). Loading, evaluation, saving and waiting
for data or other machines are not in it.

The default share is what the hours of LongLoRA's Table 12 come to on A100 (312 TFLOP/s): 0.45 to
0.51 with S² at 8k to 64k, 0.48 to 0.59 with full attention, the more the longer the row. Nothing
else was measured; Hopper GPUs usually reach less of their peak.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

FLOPS_SHARE = 0.45
MEASURED = Path(__file__).with_name("measured.json")
"""GPU → share of its peak, for those that `make gpu` measured; written by `docs/generate.py`."""
STEPS = 1000
"""Steps planned for where the recipe does not say how many."""


@dataclass(frozen=True)
class Steps:
    """How long a run is.

    Attributes:
        count: optimizer steps.
        why: where the number comes from, in words.
        rows: rows a step, over all GPUs.
        assumed: the recipe does not say.
    """

    count: int
    why: str
    rows: int
    assumed: bool = False


@dataclass(frozen=True)
class Cost:
    """What a run takes. `full` is the same run with full attention in every step.

    Attributes:
        steps, steps_from, rows_per_step, tokens_per_step: what was planned for.
        flops_share, peak_tflops: the rate: a share of TFLOP/s.
        share_from: `assumed`, `measured` on such a GPU, or `given`.
        seconds_per_step: `s2`, `full`; of a step of S², and of one with full attention.
        hours, gpu_hours, price: `run` and `full`; price is None where none was given.
    """

    steps: int
    steps_from: str
    rows_per_step: int
    tokens_per_step: int
    flops_share: float
    share_from: str
    peak_tflops: float
    seconds_per_step: dict[str, float]
    hours: dict[str, float]
    gpu_hours: dict[str, float]
    price: dict[str, float] | None


@dataclass(frozen=True)
class Rate:
    """What GPUs do and cost.

    Attributes:
        gpus: how many.
        peak_tflops: TFLOP/s of one.
        flops_share: share of it that the run reaches.
        price_per_gpu_hour: in any money; None where it is not asked for.
        share_from: as in Cost.
    """

    gpus: int
    peak_tflops: float
    flops_share: float = FLOPS_SHARE
    price_per_gpu_hour: float | None = None
    share_from: str = "assumed"


def flops_share_of(gpu: str, given: float | None) -> tuple[float, str]:
    """The share to plan with on this GPU, and whether it is `given`, `measured` or `assumed`."""
    if given is not None:
        return given, "given"
    measured = json.loads(MEASURED.read_text(encoding="utf-8"))
    return (measured[gpu], "measured") if gpu in measured else (FLOPS_SHARE, "assumed")


def cost_of(
    steps: Steps,
    rate: Rate,
    step_tflops: dict[str, float],
    *,
    sequence_len: int,
    full_share: float,
) -> Cost:
    """The cost of a run.

    Args:
        step_tflops: TFLOPs of a training step over one row, `s2` and `full`.
        full_share: share of the steps that use full attention.
    """
    speed = rate.gpus * rate.peak_tflops * rate.flops_share
    seconds = {kind: steps.rows * amount / speed for kind, amount in step_tflops.items()}
    run = full_share * seconds["full"] + (1 - full_share) * seconds["s2"]
    hours = {"run": steps.count * run / 3600, "full": steps.count * seconds["full"] / 3600}
    gpu_hours = {kind: rate.gpus * amount for kind, amount in hours.items()}
    price = None
    if rate.price_per_gpu_hour is not None:
        price = {kind: rate.price_per_gpu_hour * amount for kind, amount in gpu_hours.items()}
    return Cost(
        steps=steps.count,
        steps_from=steps.why,
        rows_per_step=steps.rows,
        tokens_per_step=steps.rows * sequence_len,
        flops_share=rate.flops_share,
        share_from=rate.share_from,
        peak_tflops=rate.peak_tflops,
        seconds_per_step=seconds,
        hours=hours,
        gpu_hours=gpu_hours,
        price=price,
    )

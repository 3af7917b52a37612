"""Will it fit, what will it cost: FLOPs and memory of a recipe, from the base's config alone.

`shape` and `parameters` read the model built without weights; `flops`, `memory`, `parallel`, `cost`
and `remedies` are arithmetic on plain values; `from_recipe` reads the recipe, `planner` puts them
together, `tables` and `plot` show it. LongLoRA (arXiv 2309.12307), Tables 11 and 12, holds it to
account in `benchmarks/paper.py`.
"""

from longlora_plugin.plan.flops import Flops, StepKind, forward_flops, step_flops, step_flops_ratio
from longlora_plugin.plan.gpus import GPUS, Gpu, find_gpu
from longlora_plugin.plan.memory import Memory, Training, memory
from longlora_plugin.plan.parameters import Parameters, count_parameters
from longlora_plugin.plan.planner import (
    Plan,
    Run,
    fits,
    largest_sequence_len,
    plan_recipe,
    plan_run,
    planned_run,
)
from longlora_plugin.plan.shape import ModelShape, meta_model, shape_of

__all__ = [
    "GPUS",
    "Flops",
    "Gpu",
    "Memory",
    "ModelShape",
    "Parameters",
    "Plan",
    "Run",
    "StepKind",
    "Training",
    "count_parameters",
    "find_gpu",
    "fits",
    "forward_flops",
    "largest_sequence_len",
    "memory",
    "meta_model",
    "plan_recipe",
    "plan_run",
    "planned_run",
    "shape_of",
    "step_flops",
    "step_flops_ratio",
]

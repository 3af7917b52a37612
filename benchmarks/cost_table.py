"""README's table: what extending an 8B model costs, on one GPU and on eight, as `plan` has it.

`python -m benchmarks.cost_table` prints it as Markdown. The model has the shape of Llama 3 8B; on
one GPU the recipe is `single-gpu-80gb` (4-bit base), on eight `qwen3-8b-128k` (16 bits, ZeRO-3),
each with another `sequence_len`. Hours are for 100 million tokens of full rows; those of S² are of
a run whose last tenth of the steps uses full attention.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from longlora_plugin.plan.gpus import find_gpu
from longlora_plugin.plan.planner import Plan, plan_run, planned_run
from longlora_plugin.recipes import recipe_path
from longlora_plugin.run.recipe import Recipe, parse_block, read_yaml

LENGTHS = (16384, 32768, 65536, 131072)
TOKENS = 1e8
GPU = "a100-80gb"
RECIPES = {1: "single-gpu-80gb", 8: "qwen3-8b-128k"}
"""How many GPUs → the recipe that is planned for them."""
LLAMA_3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
}


def planned(gpus: int, length: int) -> Plan:
    """The plan of an 8B with rows of `length` tokens on so many GPUs."""
    from transformers import LlamaConfig

    raw: dict[str, Any] = read_yaml(recipe_path(RECIPES[gpus]))
    raw |= {"base_model": "8B", "sequence_len": length, "longlora": {"full_attention_steps": 0.1}}
    recipe = Recipe(Path("recipe.yml"), raw, parse_block(raw["longlora"]))
    run = planned_run(recipe, LlamaConfig(**LLAMA_3_8B), gpus)
    return plan_run(recipe, run, find_gpu(GPU))


def rows() -> list[tuple[int, int, float, float, float]]:
    """(GPUs, length, hours with full attention, hours with S², GiB on each GPU)."""
    found = []
    for gpus in RECIPES:
        for length in LENGTHS:
            plan = planned(gpus, length)
            assert plan.cost is not None
            times = TOKENS / (plan.cost.steps * plan.cost.tokens_per_step)
            hours = plan.cost.hours
            found.append(
                (gpus, length, hours["full"] * times, hours["run"] * times, plan.memory["total"])
            )
    return found


def markdown() -> str:
    """The table of README."""
    lines = [
        "| GPUs | length | full attention | S² | saved | memory, each GPU |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for gpus, length, full, sparse, memory in rows():
        kind = "4-bit base" if gpus == 1 else "16-bit base, ZeRO-3"
        lines.append(
            f"| {gpus} × A100, {kind} | {length // 1024}k | {full:.1f} h | {sparse:.1f} h | "
            f"{1 - sparse / full:.0%} | {memory:.0f} GiB |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown())

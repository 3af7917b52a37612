"""A training step of a 7B-shaped model: seconds, memory against `plan`, waits, copies.

Random weights, made on the device: LoRA on the four projections, embeddings and norms trained as
fp32 copies, checkpointing, autocast, as Axolotl trains `adapter: longlora`.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.attention.measure import timed
from benchmarks.gpu.cases import Size, Step
from benchmarks.gpu.profiling import copies_share, device_times, waits
from longlora_plugin.adapter.fp32_weights import train_in_fp32
from longlora_plugin.adapter.modules import embedding_modules, norm_modules, shortest_names
from longlora_plugin.args import parse_block
from longlora_plugin.attention import enable_shifted_attention
from longlora_plugin.plan.planner import Run, planned_run
from longlora_plugin.run.recipe import Recipe

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
SHARE_OF_GROUP = 4


class TrainedModel:
    """The model and its optimizer, made once for all lengths."""

    def __init__(self, size: Size, device: str) -> None:
        torch.manual_seed(0)
        self.device = device
        self.config = LlamaConfig(
            **dict(size.model), max_position_embeddings=max(size.step_lengths), use_cache=False
        )
        with torch.device(device):
            base = AutoModelForCausalLM.from_config(
                self.config, dtype=torch.bfloat16, attn_implementation="sdpa"
            )
        names = shortest_names(base, [*embedding_modules(base), *norm_modules(base)])
        adapter = LoraConfig(
            r=8, lora_alpha=16, target_modules=TARGETS, modules_to_save=names, task_type="CAUSAL_LM"
        )
        base.gradient_checkpointing_enable({"use_reentrant": False})
        self.model = get_peft_model(base, adapter).to(device).train()
        train_in_fp32(self.model)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=2e-5)

    def step_on(self, tokens: torch.Tensor) -> Callable[[], None]:
        """One whole step on rows of tokens."""

        def step() -> None:
            with torch.autocast(self.device, dtype=torch.bfloat16):
                loss = self.model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

        return step

    def planned(self, case: Step) -> Run:
        """The same run as `plan` sees it."""
        block = {"rope": "none", "shifted_attention": case.attention == "s2"}
        raw = {
            "base_model": "random",
            "adapter": "longlora",
            "sequence_len": case.length,
            "micro_batch_size": 1,
            "lora_r": 8,
            "bf16": True,
            "optimizer": "adamw_torch",
            "gradient_checkpointing": True,
            "attn_implementation": "sdpa",
            "longlora": block,
        }
        recipe = Recipe(path=Path("gpu.yml"), raw=raw, block=parse_block(block))
        return planned_run(recipe, self.config)


trained_model = cache(TrainedModel)


def with_step(
    case: Step,
    size: Size,
    device: str,
    measure: Callable[[TrainedModel, Callable[[], None]], dict[str, Any]],
) -> dict[str, Any]:
    """Hand a warm step to `measure`, with S² or the model's own attention."""
    trained = trained_model(size, device)
    tokens = torch.randint(0, trained.config.vocab_size, (1, case.length), device=device)
    handle = None
    if case.attention == "s2":
        group_size = case.length // SHARE_OF_GROUP // 2 * 2
        handle = enable_shifted_attention(trained.model, group_size=group_size)
    try:
        step = trained.step_on(tokens)
        step()
        return measure(trained, step)
    finally:
        if handle is not None:
            handle.remove()
        trained.optimizer.zero_grad(set_to_none=True)
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()


def time_step(case: Step, size: Size, device: str) -> dict[str, Any]:
    """Seconds of a step (median of 3), peak GiB and what `plan` says."""

    def measure(trained: TrainedModel, step: Callable[[], None]) -> dict[str, Any]:
        planned, peak = trained.planned(case), None
        group = planned.group_at(case.length) if case.attention == "s2" else None
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = statistics.median(timed(step, device) for _ in range(3))
        if device == "cuda":
            # What PyTorch allocated, and what plan counts for CUDA itself.
            peak = torch.cuda.max_memory_allocated() / 2**30 + 1
        return {
            "seconds": seconds,
            "peak_gib": peak,
            "planned_gib": planned.memory_at(case.length).needed / 2**30,
            "planned_tflop": planned.step_at(case.length, group)["total"],
        }

    return with_step(case, size, device, measure)


def profile_step(case: Step, size: Size, device: str) -> dict[str, Any]:
    """Waits for the GPU in a step, by line, and the share of its time that copies take."""

    def measure(_: TrainedModel, step: Callable[[], None]) -> dict[str, Any]:
        times = device_times(step, device)
        return {
            "waits": waits(step) if device == "cuda" else None,
            "copies_share": copies_share(times),
            "longest": {name[:90]: round(spent) for name, spent in list(times.items())[:12]},
        }

    return with_step(case, size, device, measure)

"""Extend the small model once, as `Settings` say, and measure it.

A plain loop on the package's own parts: RoPE from `resolve_rope`, modules from `adapter`, sparse
attention from `enable_shifted_attention`. Matrix products are in bf16 (autocast), weights in fp32;
measuring is in fp32 and, unless said otherwise, with the model's own full attention.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

from benchmarks.study import measure, recall
from benchmarks.study.data import Books, book_batches, plant
from benchmarks.study.settings import Settings
from benchmarks.study.sinks import attend_with_sinks
from longlora_plugin.adapter.modules import embedding_modules, norm_modules, shortest_names
from longlora_plugin.attention import S2, AttentionPattern, enable_shifted_attention
from longlora_plugin.attention.layout import POSE
from longlora_plugin.rope import apply_rope, resolve_rope

WARMUP_STEPS = 10
PLANT = {
    "retrieval": lambda windows, books, generator: plant(windows, books.alphabet, generator),
    "recall": lambda windows, books, generator: recall.plant(windows, generator),
}
PATTERNS = {
    "s2": S2,
    "pose": POSE,
    "groups": AttentionPattern("groups", lambda heads, group_size: [0] * heads),
}


def load(model_dir: Path, settings: Settings) -> Any:
    """The base model with the preset's RoPE for the target length, untrained."""
    config = AutoConfig.from_pretrained(model_dir)
    options = {} if settings.theta is None else {"theta": settings.theta}
    apply_rope(config, resolve_rope(settings.rope, config, settings.target, **options))
    return AutoModelForCausalLM.from_pretrained(
        model_dir, config=config, attn_implementation="sdpa", dtype=torch.float32
    )


def adapt(model: Any, settings: Settings) -> Any:
    """The model with the parameters of the method trainable."""
    if settings.method == "full":
        return model
    embeddings, norms = embedding_modules(model), norm_modules(model)
    saved, low_rank = {
        "lora": ([], []),
        "lora+norm": (norms, []),
        "lora+embed": (embeddings, []),
        "longlora": (embeddings + norms, []),
        "lora-on-embed": ([], embeddings),
        "lora-on-embed+norm": (norms, embeddings),
    }[settings.method]
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=2 * settings.rank,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", *shortest_names(model, low_rank)],
        modules_to_save=shortest_names(model, saved) if saved else None,
        ensure_weight_tying=bool(saved and set(saved) >= set(embeddings)),
    )
    return get_peft_model(model, config)


def full_attention_steps(settings: Settings) -> set[int]:
    """The steps that train with full attention, of 0 … steps − 1."""
    steps = range(settings.steps)
    if settings.attention == "full":
        return set(steps)
    last = set(steps[settings.steps - settings.finishing_steps :])
    generator = torch.Generator().manual_seed(settings.seed)
    drawn = torch.randperm(settings.steps, generator=generator)
    return last | set(drawn[: round(settings.random_full * settings.steps)].tolist())


class Attention:
    """The sparse attention of a run: put on, switched off for a step or for good."""

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        self.model, self.settings = model, settings
        self.sparse_layers = [
            module
            for name, module in model.named_modules()
            if name.endswith("self_attn") and int(name.split(".")[-2]) not in settings.full_layers
        ]
        self.handle: Any = None
        self.calls_before = 0
        if settings.attention in PATTERNS:
            self.enable(settings.group_at(0))
        elif settings.attention == "sinks":
            attend = attend_with_sinks(settings.group, settings.sinks, settings.target)
            AttentionInterface.register("study_sinks", attend)

    def enable(self, group: int) -> None:
        """Sparse attention with this group size, instead of the one before."""
        self.remove()
        self.handle = enable_shifted_attention(
            self.model,
            group_size=group,
            pattern=PATTERNS[self.settings.attention],
            target_length=self.settings.target,
        )

    @property
    def calls(self) -> int:
        """Layers that have run with sparse attention, over all steps."""
        return self.calls_before + (self.handle.calls if self.handle is not None else 0)

    def train(self, *, sparse: bool, step: int = 0) -> None:
        """Training mode; layers in evaluation mode keep the model's own attention."""
        self.model.train()
        if self.handle is not None:
            if self.settings.growing and sparse:
                self.enable(self.settings.group_at(step))
            self.handle.active = sparse
            if self.settings.full_layers:
                for name, module in self.model.named_modules():
                    if name.endswith("self_attn") and module not in self.sparse_layers:
                        module.eval()
        elif self.settings.attention == "sinks":
            self.model.set_attn_implementation("study_sinks" if sparse else "sdpa")

    def evaluate(self) -> None:
        self.model.eval()
        if self.settings.attention == "sinks":
            self.model.set_attn_implementation("sdpa")

    def remove(self) -> None:
        if self.handle is not None:
            self.calls_before += self.handle.calls
            self.handle.remove()
            self.handle = None


def run(settings: Settings, model_dir: Path, books: Books) -> dict[str, Any]:
    """Train and measure; the row of the study, ready for JSON."""
    torch.manual_seed(settings.seed)
    model = adapt(load(model_dir, settings), settings)
    attention = Attention(model, settings)
    try:
        return _train_and_measure(model, attention, settings, books)
    finally:
        attention.remove()


def _train_and_measure(
    model: Any, attention: Attention, settings: Settings, books: Books
) -> dict[str, Any]:
    optimizer = optimizer_of(model, settings)
    full_steps = full_attention_steps(settings)
    rows = rows_of(settings, books)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    losses: list[float] = []
    watched: dict[int, Any] = {}

    def look(windows: int | None = None) -> dict[str, Any]:
        attention.evaluate()
        return measure.all_of(model, books, settings, windows)

    for step in range(settings.steps):
        if step in settings.watch:
            watched[step] = look(measure.QUICK_WINDOWS)
        batch = next(rows)
        sparse = step not in full_steps
        attention.train(sparse=sparse, step=step)
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * min(1.0, (step + 1) / WARMUP_STEPS)
        started = time.perf_counter()
        losses.append(step_of(model, optimizer, **batch, bf16=settings.task != "recall"))
        seconds[sparse].append(time.perf_counter() - started)
    sparse_layers = len(attention.sparse_layers) if settings.attention != "full" else 0
    _check_it_engaged(attention, settings, full_steps)
    row = {
        "trainable_parameters": model.num_parameters(only_trainable=True),
        "sparse_layers": sparse_layers,
        "final_train_loss": statistics.fmean(losses[-10:]) if losses else None,
        "seconds": round(sum(map(sum, seconds.values())), 1),
        "seconds_a_step": {
            name: round(statistics.median(seconds[sparse]), 3)
            for name, sparse in (("sparse", True), ("full", False))
            if seconds[sparse]
        },
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    row |= look()
    if watched:
        row["watched"] = {**watched, settings.steps: look(measure.QUICK_WINDOWS)}
    if attention.handle is not None and settings.task == "books":
        attention.train(sparse=True)
        row["evaluated_sparse"] = measure.perplexity_in_this_mode(model, books, settings)
    return row


def rows_of(settings: Settings, books: Books) -> Iterator[dict[str, Tensor]]:
    """What each step trains on: ids, labels and, for skipped positions, positions, all [B, N]."""
    batches = {
        length: book_batches(books.train, length, settings.tokens_a_step // length, settings.seed)
        for length in (settings.short_rows, settings.target)
    }
    planter = torch.Generator().manual_seed(settings.seed + 1)
    for step in range(settings.steps):
        short = step < settings.short_steps
        ids = labels = next(batches[settings.short_rows if short else settings.target])
        if settings.task != "books":
            half = len(ids) if settings.task == "recall" else len(ids) // 2
            asked, answers = PLANT[settings.task](ids[:half], books, planter)
            ids, labels = torch.cat([asked, ids[half:]]), torch.cat([answers, labels[half:]])
        batch = {"ids": ids, "labels": labels}
        if short and settings.skipped:
            batch["positions"] = skipped_positions(*ids.shape, settings.target, planter)
        yield batch


def skipped_positions(rows: int, length: int, target: int, generator: torch.Generator) -> Tensor:
    """PoSE's: two chunks, and between them a random stretch left out, up to `target`, [B, N]."""
    cuts = torch.randint(1, length, (rows, 1), generator=generator)
    skips = torch.randint(target - length + 1, (rows, 1), generator=generator)
    place = torch.arange(length).expand(rows, -1)
    return place + skips * (place >= cuts)


def optimizer_of(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """AdamW with the paper's numbers over what is trainable."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(
        trained, lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.0
    )


def step_of(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ids: Tensor,
    labels: Tensor,
    positions: Tensor | None = None,
    bf16: bool = True,
) -> float:
    """One optimizer step on windows [B, N]; the loss before it."""
    skipped: dict[str, Tensor] = {}
    if positions is not None:
        # Without a mask, transformers takes a jump in the positions for the start of another row.
        skipped = {"position_ids": positions, "attention_mask": torch.ones_like(ids)}
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = model(input_ids=ids, labels=labels, use_cache=False, **skipped).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def _check_it_engaged(attention: Attention, settings: Settings, full_steps: set[int]) -> None:
    if attention.handle is None:
        return
    sparse_steps = settings.steps - len(full_steps)
    expected = sparse_steps * len(attention.sparse_layers)
    if attention.calls != expected:
        raise RuntimeError(
            f"{settings.key}: sparse attention ran {attention.calls} times, not {expected}"
        )

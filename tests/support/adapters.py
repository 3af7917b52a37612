"""Adapters as PEFT really saves them, with every trained tensor moved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from longlora_plugin.adapter.modules import (
    attention_projections,
    embedding_modules,
    embeddings_are_tied,
    norm_modules,
    shortest_names,
)
from longlora_plugin.run.axolotl_keys import LORA_TARGETS


def wrapped(model: torch.nn.Module, **options: Any) -> PeftModel:
    """The model with an adapter as `adapter: longlora` gives it, `options` for LoraConfig."""
    leaves = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    names = [*embedding_modules(model), *norm_modules(model)]
    defaults = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": LORA_TARGETS
        if leaves & {*LORA_TARGETS}
        else attention_projections(model),
        "modules_to_save": shortest_names(model, names),
        "ensure_weight_tying": embeddings_are_tied(model),
        "task_type": "CAUSAL_LM",
    }
    return get_peft_model(model, LoraConfig(**{**defaults, **options}))


def move_and_save(model: PeftModel, folder: Path, scale: float = 0.05) -> None:
    """Change every trained tensor, as training would, and save the adapter."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    model.save_pretrained(folder)

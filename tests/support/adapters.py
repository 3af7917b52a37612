"""Adapters as PEFT really saves them, with every trained tensor moved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from longlora_plugin.adapter.modules import (
    attention_projections,
    embedding_modules,
    embeddings_are_tied,
    norm_modules,
    shortest_names,
)
from longlora_plugin.run.axolotl_keys import LORA_TARGETS

IDS = torch.arange(3, 43)[None]
SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}


def base_folder(
    folder: Path, family: str = "llama", *, max_shard_size: str = "1GB", **options: object
) -> Path:
    """A tiny random base model of a family."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SIZES, **options})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder / "base", max_shard_size=max_shard_size)
    return folder / "base"


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


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

"""Small models for the tests of `evaluation/`: three with an answer known by hand, and files.

The known ones are plain modules that answer like a transformers causal language model:
``model(input_ids=[B, n]).logits`` is ``[B, n, V]``; row i is the prediction of token i + 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import tiny
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

ORIGINAL = 64
"""Context of the tiny Llama."""
TARGET = 4 * ORIGINAL
YARN = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 4.0,
    "original_max_position_embeddings": ORIGINAL,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}


class Known(nn.Module):
    """Probabilities `answer(input_ids) -> [B, n, V]`, as logits. Counts its forward passes."""

    def __init__(self, vocab_size: int, answer: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        text = SimpleNamespace(vocab_size=vocab_size)
        self.config = SimpleNamespace(get_text_config=lambda: text)
        self.answer = answer
        self.shapes: list[tuple[int, int]] = []

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> SimpleNamespace:
        self.shapes.append(tuple(input_ids.shape))
        return SimpleNamespace(logits=self.answer(input_ids).clamp_min(1e-30).log())


def bigram(table: list[list[float]]) -> Known:
    """P(next | current) from a table [V, V]."""
    return Known(len(table), lambda ids: torch.tensor(table)[ids])


def by_position(loss: Callable[[int], float], length: int) -> Known:
    """Token 0 after p tokens costs exactly `loss(p)` nats, whatever they were."""

    def answer(ids: Tensor) -> Tensor:
        probability = torch.tensor([math.exp(-loss(p)) for p in range(1, length + 2)])
        rows = probability[: ids.shape[1]].expand(ids.shape)
        return torch.stack([rows, 1 - rows], dim=-1)

    return Known(2, answer)


def repeats_its_first_token(vocab_size: int) -> Known:
    """Certain that every token equals its row's first: an infinite loss where a row mixes."""
    return Known(
        vocab_size,
        lambda ids: nn.functional.one_hot(ids[:, :1].expand(ids.shape), vocab_size).float(),
    )


def text_of(words: int, seed: int = 0) -> str:
    """Deterministic prose of a small vocabulary."""
    vocabulary = ["the", "rain", "fell", "on", "roofs", "while", "boats", "went", "under", "bells"]
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(vocabulary), (words,), generator=generator).tolist()
    return " ".join(vocabulary[pick] for pick in picks) + "."


def write_tiny_llama(folder: Path) -> Path:
    """A random Llama whose answers depend on the position, with its own tokenizer."""
    return tiny.write_llama(
        folder,
        tiny.byte_tokenizer(text_of(400), special_tokens=["<pad>", "<s>", "</s>"], begins=True),
        hidden_size=32,
        intermediate_size=48,
        max_position_embeddings=ORIGINAL,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        initializer_range=0.3,
        tie_word_embeddings=True,
    )


def random_mistral(vocab_size: int) -> MistralForCausalLM:
    """With a sliding window of 32 tokens: its cache forgets."""
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=32,
        initializer_range=0.3,
    )
    return MistralForCausalLM(config).eval()


def write_adapter(base: Path, folder: Path) -> Path:
    """A PEFT adapter with changed LoRA weights, embeddings and norms."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    model = get_peft_model(
        LlamaForCausalLM.from_pretrained(base),
        LoraConfig(
            r=2,
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
            modules_to_save=["embed_tokens", "norm", "input_layernorm"],
            ensure_weight_tying=True,
        ),
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return folder


def write_recipe(path: Path, base: Path, output: Path, **keys: object) -> Path:
    """A recipe that extends the tiny Llama to four times its context."""
    extends = {"sequence_len": 4 * ORIGINAL, "longlora": {"rope": "yarn"}}
    return tiny.write_recipe(path, base, output, {**extends, **keys})


def extended(base: Path) -> LlamaForCausalLM:
    """The tiny Llama with YaRN, four times its context."""
    config = LlamaConfig.from_pretrained(base)
    config.rope_parameters = YARN
    config.max_position_embeddings = TARGET
    return LlamaForCausalLM.from_pretrained(base, config=config).eval()


def own_perplexity(model: nn.Module, ids: Tensor, length: int, stride: int) -> float:
    """The usual sliding-window loop, written with labels."""
    losses, done = [], 0
    for start in range(0, ids.shape[1], stride):
        end = min(start + length, ids.shape[1])
        labels = ids[:, start:end].clone()
        labels[:, : max(0, done - start)] = -100
        with torch.no_grad():
            logits = model(input_ids=ids[:, start:end]).logits[0, :-1]
        part = F.cross_entropy(logits, labels[0, 1:], reduction="none", ignore_index=-100)
        losses += part[labels[0, 1:] != -100].tolist()
        done = end
        if end == ids.shape[1]:
            break
    assert len(losses) == ids.shape[1] - 1
    return math.exp(np.mean(losses))

"""Recipes written as Axolotl's own examples are, without LongLoRA, and what each has to become."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "axolotl_recipes"
YARN = {"rope_type": "yarn"}


@dataclass(frozen=True)
class Expected:
    """What a recipe has to become.

    Attributes:
        adapter: what Axolotl gets.
        extends: from and to how many tokens; None where the base already covers sequence_len.
        rope: rope_type and factor after; the base's own where nothing is extended.
        group: group size.
        gpus: GPUs the recipe is for.
        lora: LoRA's settings after, where the recipe has its own.
    """

    adapter: str
    extends: tuple[int, int] | None
    rope: dict[str, Any]
    group: int
    gpus: int = 1
    lora: dict[str, Any] = field(default_factory=dict)


EXPECTED = {
    "llama-2-qlora-packed-alpaca": Expected(
        adapter="qlora",
        extends=(4096, 16384),
        rope={**YARN, "factor": 4.0},
        group=4096,
        lora={"lora_r": 32, "lora_alpha": 16, "lora_dropout": 0.05, "lora_target_linear": True},
    ),
    "llama-2-lora-in-8-bits": Expected(
        adapter="lora",
        extends=(4096, 8192),
        rope={**YARN, "factor": 2.0},
        group=2048,
        lora={"lora_r": 32},
    ),
    "llama-3-lora-chat-template": Expected(
        adapter="lora",
        extends=(8192, 32768),
        rope={**YARN, "factor": 4.0},
        group=8192,
        lora={"lora_r": 64},
    ),
    "llama-3-1-qlora-fsdp2": Expected(
        adapter="qlora",
        extends=None,
        rope={"rope_type": "llama3", "factor": 8.0},
        group=2048,
        gpus=2,
        lora={"lora_r": 8},
    ),
    "llama-3-2-1b-qlora-tied-embeddings": Expected(
        adapter="qlora",
        extends=None,
        rope={"rope_type": "llama3", "factor": 32.0},
        group=512,
    ),
    "code-llama-lora": Expected(
        adapter="lora",
        extends=(16384, 65536),
        rope={**YARN, "factor": 4.0},
        group=16384,
    ),
    "mistral-lora-deepspeed-zero-2": Expected(
        adapter="lora",
        extends=(32768, 65536),
        rope={**YARN, "factor": 2.0},
        group=16384,
        gpus=4,
    ),
    "mixtral-qlora-expert-router-left-alone": Expected(
        adapter="qlora",
        extends=(32768, 65536),
        rope={**YARN, "factor": 2.0},
        group=16384,
    ),
    "qwen2-5-lora-chat-template-and-liger": Expected(
        adapter="lora",
        extends=(32768, 131072),
        rope={**YARN, "factor": 4.0},
        group=32768,
    ),
    "qwen3-qlora-with-its-own-lora-kernels": Expected(
        adapter="qlora",
        extends=(32768, 65536),
        rope={**YARN, "factor": 2.0},
        group=16384,
    ),
    "gemma-2-qlora-layers-with-a-window": Expected(
        adapter="qlora",
        extends=(8192, 16384),
        rope={**YARN, "factor": 2.0},
        group=4096,
    ),
    "phi-2-lora-partial-rotary": Expected(
        adapter="lora",
        extends=(2048, 8192),
        rope={**YARN, "factor": 4.0, "partial_rotary_factor": 0.4},
        group=2048,
    ),
    "pythia-lora-fused-projections": Expected(
        adapter="lora",
        extends=(2048, 4096),
        rope={**YARN, "factor": 2.0, "partial_rotary_factor": 0.25},
        group=1024,
        lora={"lora_target_modules": ["query_key_value"]},
    ),
    "llama-2-70b-lora-deepspeed-zero-3-completion": Expected(
        adapter="lora",
        extends=(4096, 32768),
        rope={**YARN, "factor": 8.0},
        group=8192,
        gpus=8,
    ),
}
"""Name of the file in FOLDER → what it becomes."""


def text_of(name: str) -> str:
    """The recipe as its author wrote it; its `base_model` is the name of a hub."""
    return (FOLDER / f"{name}.yml").read_text(encoding="utf-8")

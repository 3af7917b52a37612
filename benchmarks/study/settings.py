"""What one training run of the study is: the numbers that make it, and the name they give it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass

ORIGINAL_CONTEXT = 256
"""Tokens the bundled model was pretrained on."""


TEST_VERSION = {"books": "", "retrieval": "#2"}
"""Changes with how a task is trained for or measured, so that older runs of it are made again."""


@dataclass(frozen=True)
class Settings:
    """One run. The defaults are those of the main rows.

    Attributes:
        task: `books`, plain text; `retrieval`, half of the windows with a passkey.
        method: `longlora`, `lora`, `lora+norm`, `lora+embed`, `full` (every weight); LoRA on the
            embeddings, too: `lora-on-embed`, `lora-on-embed+norm`.
        rank: of LoRA; alpha is twice the rank.
        attention: `s2`, `full`, `groups` (no head is shifted) or `sinks` (S²-Attn whose queries
            also see the first `sinks` tokens).
        group: tokens in a group.
        finish: share of the steps, the last ones, with full attention.
        random_full: share of the steps, drawn at random, with full attention.
        full_layers: decoder layers that keep full attention.
        rope: preset, with `theta` for the preset of that name.
        target: tokens to extend to, and the length of the windows.
        steps: optimizer steps of `batch` windows; 4096 tokens a step unless said otherwise.
        watch: steps at which to measure beside the last one.
        seed: of LoRA's initialisation, of the order of the windows and of what is planted.
    """

    task: str = "books"
    method: str = "longlora"
    rank: int = 8
    attention: str = "s2"
    group: int = 512
    finish: float = 0.0
    random_full: float = 0.0
    full_layers: tuple[int, ...] = ()
    sinks: int = 0
    rope: str = "yarn"
    theta: float | None = None
    target: int = 2048
    steps: int = 100
    tokens_a_step: int = 4096
    learning_rate: float = 1e-3
    watch: tuple[int, ...] = ()
    seed: int = 0

    @property
    def batch(self) -> int:
        return self.tokens_a_step // self.target

    @property
    def finishing_steps(self) -> int:
        return round(self.finish * self.steps)

    @property
    def key(self) -> str:
        """Name of the run's file: readable, and different for different settings."""
        text = json.dumps(asdict(self), sort_keys=True) + TEST_VERSION[self.task]
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        return f"{self.task}-{self.method}-{self.attention}-{self.rope}-{self.seed}-{digest}"

    def as_dict(self) -> dict[str, object]:
        return asdict(self)

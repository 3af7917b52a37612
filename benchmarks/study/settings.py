"""What one training run of the study is: the numbers that make it, and the name they give it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields

BASE_CONTEXT = {"books": 256, "retrieval": 256, "recall": 64}
"""Tokens that the base model of a task was pre-trained on."""

TEST_VERSION = {"books": "", "retrieval": "#2", "recall": ""}
"""Changes with how a task is trained for or measured, so that older runs of it are made again."""

LATER = ("short_share", "short_rows", "skipped", "growing")
"""Settings that came after the first runs: they are part of a name only where they are used."""


@dataclass(frozen=True)
class Settings:
    """One run. The defaults are those of the main rows.

    Attributes:
        task: `books`, plain text; `retrieval`, half of the windows with a passkey; `recall`, facts
            in all of them, ×32 from a base model of 64 tokens.
        method: `longlora`, `lora`, `lora+norm`, `lora+embed`, `full` (every weight); LoRA on the
            embeddings, too: `lora-on-embed`, `lora-on-embed+norm`.
        rank: of LoRA; alpha is twice the rank.
        attention: `s2`, `full`, `groups` (no head is shifted), `pose` (nor is here, and positions
            skip) or `sinks` (S²-Attn whose queries also see the first `sinks` tokens).
        group: tokens in a group.
        growing: instead of `group`: one size after the other, in equal parts of the steps before
            the finish.
        finish: share of the steps, the last ones, with full attention.
        random_full: share of the steps, drawn at random, with full attention.
        full_layers: decoder layers that keep full attention.
        rope: preset, with `theta` for the preset of that name.
        target: tokens to extend to, and the length of the windows.
        steps: optimizer steps of `batch` windows; 4096 tokens a step unless said otherwise.
        watch: steps at which to measure beside the last one.
        seed: of LoRA's initialisation, of the order of the windows and of what is planted.
        short_share: share of the steps, the first ones, on rows of `short_rows` tokens, as many
            tokens a step as the others.
        skipped: the positions of short rows leave out a random stretch, as PoSE has it.
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
    short_share: float = 0.0
    short_rows: int = 512
    skipped: bool = False
    growing: tuple[int, ...] = ()

    def group_at(self, step: int) -> int:
        """Tokens in a group at a step before the finish."""
        before = self.steps - self.finishing_steps
        return self.growing[step * len(self.growing) // before] if self.growing else self.group

    @property
    def short_steps(self) -> int:
        return round(self.short_share * self.steps)

    @property
    def finishing_steps(self) -> int:
        return round(self.finish * self.steps)

    @property
    def key(self) -> str:
        """Name of the run's file: readable, and different for different settings."""
        plain = {f.name: f.default for f in fields(self) if f.name in LATER}
        used = {k: v for k, v in asdict(self).items() if k not in plain or v != plain[k]}
        text = json.dumps(used, sort_keys=True) + TEST_VERSION[self.task]
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        return f"{self.task}-{self.method}-{self.attention}-{self.rope}-{self.seed}-{digest}"

    def as_dict(self) -> dict[str, object]:
        return asdict(self)

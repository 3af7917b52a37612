"""Test-only Axolotl plugin: which passes of preference training used S²-Attn, and GRPO's ratios.

Writes to $LONGLORA_TEST_PROBE; also a reward, and the rows of a dataset as GRPO wants them.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from axolotl.integrations.base import BasePlugin
from transformers import TrainerCallback

MARK = "_longlora_shifted_attention"


def share_of_a(completions: list[str], **_: Any) -> list[float]:
    return [text.count("a") / max(1, len(text)) for text in completions]


def prompts(cfg: Any, **_: Any) -> Any:
    return lambda sample: {"prompt": sample["prompt"]}


def handle_of(model: torch.nn.Module | None) -> Any:
    modules = () if model is None else model.modules()
    return next((m.__dict__[MARK] for m in modules if MARK in m.__dict__), None)


class _Probe(TrainerCallback):
    def __init__(self, trainer: Any, path: Path) -> None:
        self.path = path
        self.handles = [handle_of(trainer.model), handle_of(getattr(trainer, "ref_model", None))]
        self.found: dict[str, Any] = {
            "before": self._calls(),
            "steps": [],
            "generating": [],
            "ratios": [],
            "trained": {
                n: str(p.dtype) for n, p in trainer.model.named_parameters() if p.requires_grad
            },
        }
        self._watch_generation(trainer)
        if hasattr(trainer, "num_generations"):
            self._watch_ratios(trainer)

    def _calls(self) -> list[int]:
        return [handle.calls if handle else 0 for handle in self.handles]

    def _watch_generation(self, trainer: Any) -> None:
        base = getattr(trainer.model, "get_base_model", lambda: trainer.model)()
        original = getattr(base, "generate", None)
        if original is None:
            return

        def generate(*args: Any, **kwargs: Any) -> Any:
            before = self._calls()
            text = original(*args, **kwargs)
            self.found["generating"].append([before, self._calls()])
            return text

        base.generate = generate

    def _watch_ratios(self, trainer: Any) -> None:
        logps, loss = trainer._get_per_token_logps_and_entropies, trainer._compute_loss
        policy: list[torch.Tensor] = []

        def remember(*args: Any, **kwargs: Any) -> Any:
            out = logps(*args, **kwargs)
            if torch.is_grad_enabled():
                policy.append(out[0].detach())
            return out

        def compute_loss(model: Any, inputs: dict[str, Any]) -> Any:
            out = loss(model, inputs)
            away = {
                name: float(
                    (policy[-1] - inputs[name])[inputs["completion_mask"].bool()].abs().max()
                )
                for name in ("old_per_token_logps", "ref_per_token_logps")
                if inputs.get(name) is not None
            }
            self.found["ratios"].append(away)
            return out

        trainer._get_per_token_logps_and_entropies = remember
        trainer._compute_loss = compute_loss

    def on_step_end(self, args, state, control, **kwargs):
        self.found["steps"].append(self._calls())
        self.path.write_text(json.dumps(self.found))


class PreferenceProbe(BasePlugin):
    def add_callbacks_post_trainer(self, cfg, trainer):
        path = os.environ.get("LONGLORA_TEST_PROBE")
        return [_Probe(trainer, Path(path))] if path else []

"""Test-only Axolotl plugin: what a run trained, to compare with what it saved.

Writes `outcome.pt` to the output folder: logits of the trained model for `TOKENS`, and the trained
tensors that no step changed.
"""

from __future__ import annotations

from pathlib import Path

import torch
from axolotl.integrations.base import BasePlugin

TOKENS = torch.arange(3, 99)[None]


class OutcomeProbe(BasePlugin):
    def add_callbacks_post_trainer(self, cfg, trainer):
        self.before = {
            name: parameter.detach().clone()
            for name, parameter in trainer.model.named_parameters()
            if parameter.requires_grad
        }
        return []

    def post_train(self, cfg, model):
        path = Path(cfg.output_dir, "outcome.pt")
        if path.exists():
            return  # Axolotl calls it twice
        now = dict(model.named_parameters())
        same = [name for name, old in self.before.items() if torch.equal(old, now[name])]
        model.eval()
        with torch.no_grad():
            logits = model(input_ids=TOKENS).logits.float()
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"logits": logits, "unchanged": same, "trained": len(self.before)}, path)

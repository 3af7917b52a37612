"""Test-only Axolotl plugin: writes what a trained model is made of to $LONGLORA_TEST_PROBE."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from axolotl.integrations.base import BasePlugin
from torch.nn import functional
from transformers import TrainerCallback


def dequantized_weight(module: torch.nn.Module) -> torch.Tensor:
    import bitsandbytes as bnb

    if isinstance(module, bnb.nn.Linear4bit):
        return bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
    state = module.state
    rows = module.weight.SCB if state.SCB is None else state.SCB
    return module.weight.data.float() * rows.float()[:, None] / 127


def quantized(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    import bitsandbytes as bnb

    kinds = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
    return {name: m for name, m in model.named_modules() if isinstance(m, kinds)}


def gradients(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    model.train()
    loss = model(**batch).loss
    found = torch.autograd.grad(loss, list(trained.values()))
    return dict(zip(trained, (gradient.float() for gradient in found), strict=True))


def gradient_error(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, float]:
    """Relative error of each trained tensor's gradient against the dequantized model's."""
    ours = gradients(model, batch)
    modules = quantized(model)
    for module in modules.values():
        weight = dequantized_weight(module)
        module.forward = lambda x, weight=weight: functional.linear(x, weight.to(x.dtype))
    theirs = gradients(model, batch)
    for module in modules.values():
        del module.forward
    return {
        name: float((ours[name] - theirs[name]).norm() / theirs[name].norm().clamp_min(1e-12))
        for name in ours
    }


class _Probe(TrainerCallback):
    def __init__(self, trainer, path: Path) -> None:
        self.trainer, self.path = trainer, path
        self.found: dict[str, object] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        model = self.trainer.model
        modules = quantized(model)
        optimizer = self.trainer.optimizer
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        self.found.update(
            quantized=sorted(modules),
            kinds=sorted({type(m).__name__ for m in modules.values()}),
            nested=sorted(
                {
                    bool(getattr(m.weight, "quant_state", None) and m.weight.quant_state.nested)
                    for m in modules.values()
                }
            ),
            trained={name: str(p.dtype) for name, p in model.named_parameters() if p.requires_grad},
            learning_rates={
                name: rates.get(id(p)) for name, p in model.named_parameters() if p.requires_grad
            },
            optimizer_bits=getattr(
                getattr(getattr(optimizer, "optimizer", optimizer), "args", None), "optim_bits", 32
            ),
        )
        if modules:
            self.found["gradient_error"] = gradient_error(model, self._batch())
            self.found["activations"] = self._activations(model)

    def on_evaluate(self, args, state, control, **kwargs):
        if quantized(self.trainer.model):
            self.found["gradient_error_after_evaluation"] = gradient_error(
                self.trainer.model, self._batch()
            )

    def on_train_end(self, args, state, control, **kwargs):
        self.path.write_text(json.dumps(self.found))

    def _batch(self) -> dict[str, torch.Tensor]:
        dataset = self.trainer.train_dataset
        rows = [dataset[i] for i in range(2)]
        return dict(self.trainer.data_collator([{k: r[k] for k in r} for r in rows]))

    def _activations(self, model: torch.nn.Module) -> list[str]:
        """dtypes of what enters the model's own linear layers."""
        seen: set[str] = set()
        handles = [
            module.register_forward_pre_hook(lambda _m, args: seen.add(str(args[0].dtype)))
            for module in quantized(model).values()
        ]
        with torch.no_grad():
            model(**self._batch())
        for handle in handles:
            handle.remove()
        return sorted(seen)


class ModelProbe(BasePlugin):
    def add_callbacks_post_trainer(self, cfg, trainer):
        path = os.environ.get("LONGLORA_TEST_PROBE")
        return [_Probe(trainer, Path(path))] if path else []

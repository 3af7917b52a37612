"""Models that are in memory already, measured by `bench`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from longlora_plugin.evaluation.bench import Bench
from longlora_plugin.evaluation.loading import LoadedModel
from longlora_plugin.evaluation.options import BenchOptions
from longlora_plugin.evaluation.processes import Processes
from longlora_plugin.evaluation.sweep import sweep

ALONE = Processes(0, 1, "cpu")


class Source(SimpleNamespace):
    """A model that is there already."""

    def load(self, device, dtype):
        return LoadedModel(self, self.model, self.own_tokenizer, torch.device(device), dtype)

    def identity(self):
        return {}

    def description(self):
        return {}


def bench(model, tokenizer, tasks, lengths, limit=3, processes=ALONE) -> list[dict[str, Any]]:
    source = Source(label="model", model=model, own_tokenizer=tokenizer, tokenizer="")
    options = BenchOptions(tasks=tuple(tasks), lengths=tuple(lengths), limit=limit)
    experiment = Bench({"model": tokenizer}, options, processes)
    return sweep(experiment, [source], dtype=torch.float32, processes=processes)

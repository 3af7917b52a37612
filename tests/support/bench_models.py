"""Models that are in memory already, measured by `bench`."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from benchmarks.ruler.models import Retriever
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


def of_half_the_keys(folder: str, processes: Processes) -> list[dict[str, Any]]:
    """Rows of a retriever that knows some keys only: its score depends on which it meets."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    model = Retriever(tokenizer)
    model.knows = lambda key: len(key) % 2 == 0
    return bench(model, tokenizer, ["niah_single_1"], [768], limit=7, processes=processes)


if __name__ == "__main__":
    here = Processes.here()
    rows = of_half_the_keys(sys.argv[1], here)
    if here.main:
        print(json.dumps(rows))

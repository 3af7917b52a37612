"""Tasks for `processes.py`: the rows of each epoch, as transformers' trainer reads them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice
from types import SimpleNamespace
from typing import Any

import deepspeed.comm
import torch
import torch.distributed as dist
import transformers.trainer
from accelerate.data_loader import prepare_data_loader
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPDataLoaderAdapter
from torch.utils.data import BatchSampler, DataLoader

from longlora_plugin.host.context_parallel import train_under_deepspeed

ROWS, EPOCHS, TOKENS = 10, 3, 4


class Packed(BatchSampler):
    """Draws by its own epoch, as Axolotl's sampler of packed rows."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        yield from ([i] for i in random.Random(self.epoch).sample(range(ROWS), ROWS))


class Accelerator:
    """What accelerate's has of the loader, in processes that DeepSpeed has not begun."""

    def __init__(self, stage: int, group: Any = None) -> None:
        self.state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=stage))
        self.group = group

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def deepspeed_ulysses_dl_adapter(self, loader: DataLoader, model: Any) -> Any:
        rank, size = dist.get_rank(self.group), dist.get_world_size(self.group)
        return UlyssesSPDataLoaderAdapter(loader, rank, self.group, size, "cpu")


def loader_of(packed: bool, processes: int = 1, rank: int = 0) -> DataLoader:
    positions = torch.arange(TOKENS)
    rows = [
        {"input_ids": torch.full((TOKENS,), i), "labels": positions, "position_ids": positions}
        for i in range(ROWS)
    ]
    drawn: dict[str, Any] = {"batch_size": 1, "shuffle": True}
    if packed:
        drawn = {"batch_sampler": Packed(range(ROWS), 1, False)}
    return prepare_data_loader(
        DataLoader(rows, **drawn),
        num_processes=processes,
        process_index=rank,
        use_seedable_sampler=True,
        data_seed=7,
    )


def read(loader: Any, trained: int) -> list[list[int]]:
    """Number of each row by epoch, from the row after the `trained` first: `Trainer._run_epoch`."""
    begun, skipped = divmod(trained, ROWS)
    found = []
    for epoch in range(begun, EPOCHS):
        rows = loader
        if skipped:
            rows = transformers.trainer.skip_first_batches(loader, skipped)
        if hasattr(rows, "set_epoch"):
            rows.set_epoch(epoch)
        sampler = getattr(getattr(rows, "batch_sampler", None), "batch_sampler", None)
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)
        found.append([int(row["input_ids"][0, 0]) for row in islice(iter(rows), ROWS - skipped)])
        skipped = 0
    return found


def read_shared(group: Any, packed: bool, trained: int) -> list[list[int]]:
    deepspeed.comm.init_distributed("gloo", auto_mpi_discovery=False)
    accelerator = Accelerator(2, group)
    before, skip = dict(vars(accelerator)), transformers.trainer.skip_first_batches
    undo = train_under_deepspeed(SimpleNamespace(accelerator=accelerator), 2)
    loader = loader_of(packed, dist.get_world_size(group), dist.get_rank(group))
    found = read(accelerator.deepspeed_ulysses_dl_adapter(loader, None), trained)
    undo()
    assert vars(accelerator) == before
    assert transformers.trainer.skip_first_batches is skip
    return found

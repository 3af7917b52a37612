"""A training run whose rows several processes share: S²-Attn learns of it where training begins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist
from transformers import TrainerCallback

from longlora_plugin.attention.install import ShiftedAttention
from longlora_plugin.attention.shards import Exchange


class ShareRows(TrainerCallback):
    """Gives handles the group of processes, and tells what a layer exchanges.

    Args:
        handles: of the models that the run loaded.
        processes: how many share a row, as the recipe says.
        group: function that returns their group; asked where training begins.
        log: takes one line.
    """

    def __init__(
        self,
        handles: Sequence[ShiftedAttention],
        processes: int,
        group: Callable[[], dist.ProcessGroup],
        log: Callable[[str], None],
    ) -> None:
        self.handles = handles
        self.processes = processes
        self.group = group
        self.log = log
        self._told = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        group = self.group()
        size = dist.get_world_size(group)
        if size != self.processes:
            raise RuntimeError(
                f"the recipe shares rows between {self.processes} processes, and this group has "
                f"{size}; launch a multiple of {self.processes} processes"
            )
        for handle in self.handles:
            handle.share_rows(group)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        exchange = next((each.exchange for each in self.handles if each.exchange), None)
        if exchange is not None and not self._told:
            self._told = True
            self.log(told(exchange))


def told(exchange: Exchange) -> str:
    """One line: how rows lie, and what S² and ring attention bring a process in each layer."""
    came = "none from others"
    if exchange.halo:
        source = f"the {exchange.hops} processes" if exchange.hops > 1 else "the process"
        came = f"up to {exchange.halo} more from {source} before it"
    return (
        f"context parallel over {exchange.processes} processes: {exchange.tokens} tokens each, "
        f"{came} ({_size(exchange.received)} a layer; ring attention: {_size(exchange.ring)})"
    )


def _size(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} bytes"

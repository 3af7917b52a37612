"""Several processes on one evaluation, as `accelerate launch` or `torchrun` starts them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Processes:
    """This process among all.

    Attributes:
        rank: 0 … count − 1; process 0 reads and writes files and prints.
        count: how many there are.
        device: where this one computes, for example "cuda:1" or "cpu".
    """

    rank: int
    count: int
    device: str

    @classmethod
    def here(cls) -> Processes:
        """Join the other processes, if this one was launched as one of several."""
        import torch

        cuda = torch.cuda.is_available()
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls(0, 1, "cuda" if cuda else "cpu")
        from accelerate import PartialState

        state = PartialState(cpu=not cuda)
        return cls(state.process_index, state.num_processes, str(state.device))

    @property
    def main(self) -> bool:
        return self.rank == 0

    def gather(self, items: list[Any]) -> list[Any]:
        """The items of all processes, in every process."""
        if self.count == 1:
            return items
        from accelerate.utils import gather_object

        return list(gather_object(items))

    def from_main(self, value: Any) -> Any:
        """What process 0 has, in every process."""
        if self.count == 1:
            return value
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([value])[0]


ALONE = Processes(0, 1, "cpu")

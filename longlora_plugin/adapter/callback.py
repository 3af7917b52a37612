"""An adapter while it trains: nothing of it is left out, and it is saved whole and in fp32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from longlora_plugin.adapter.state import (
    gather_adapter_state,
    load_adapter_state,
    read_adapter_state,
    save_adapter,
    save_adapter_state,
)

TRAINED = ("lora_", ".modules_to_save.")
"""Parts of the names of an adapter's tensors."""


class SaveWholeAdapter(TrainerCallback):
    """Whole fp32 adapters in every checkpoint and, through `finish`, at the end.

    Args:
        model: the PEFT model.
        saved_by_peft: whether checkpoints have an adapter already (DeepSpeed's, rounded to bf16)
            or none (FSDP2's).
        start_from: folder or name of an adapter that the run continues from, where that is to be
            set once training begins.
    """

    def __init__(
        self, model: Any, *, saved_by_peft: bool, start_from: str | Path | None = None
    ) -> None:
        self.model = model
        self.saved_by_peft = saved_by_peft
        self.start_from = start_from
        self._last: dict[str, torch.Tensor] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # A resumed run has its masters from the checkpoint.
        if self.start_from is not None and state.global_step == 0:
            load_adapter_state(self.model, read_adapter_state(self.start_from))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if not self.saved_by_peft:
            save_adapter(self.model, folder)
            return
        tensors = gather_adapter_state(self.model)
        if tensors:
            save_adapter_state(folder, tensors, into=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.saved_by_peft:
            self._last = gather_adapter_state(self.model)

    def finish(self, folder: Path) -> None:
        """Put the fp32 tensors into the adapter that was saved at the end; no communication."""
        if self._last:
            save_adapter_state(folder, self._last, into=True)
            self._last = {}


class CheckOptimizer(TrainerCallback):
    """Stops a run of one process or DDP before step 1 where a tensor of the adapter would not move.

    Args:
        optimizer: its name in the recipe.
        error: the exception to raise.
    """

    def __init__(self, optimizer: str, error: type[Exception]) -> None:
        self.optimizer = optimizer
        self.error = error

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        moved = {
            id(parameter)
            for group in kwargs["optimizer"].param_groups
            for parameter in group["params"]
            if parameter.requires_grad
        }
        left = [
            name
            for name, parameter in kwargs["model"].named_parameters()
            if any(part in name for part in TRAINED)
            and ".default" in name  # TRL adds the adapter of a reference model, which is frozen
            and id(parameter) not in moved
        ]
        if left:
            raise self.error(
                f"optimizer: {self.optimizer} leaves out {len(left)} tensors of the adapter "
                f"({', '.join(left[:3])}, …), which would never train; write "
                "optimizer: adamw_torch_fused"
            )

"""An optimizer may leave out what it does not know: a run that would not train is stopped."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

TRAINED = ("lora_", ".modules_to_save.")
"""Parts of the names of an adapter's tensors."""


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

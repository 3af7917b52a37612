"""Make a PEFT model ready to train: fp32 weights, and an earlier adapter's exact values."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from longlora_plugin.adapter.fp32_weights import TrainedModules, train_in_fp32, undo_rounding
from longlora_plugin.adapter.modules import untrained_modules
from longlora_plugin.adapter.state import load_adapter_state, read_adapter_state, some


def prepare_adapter(
    model: Any,
    names: Iterable[str],
    *,
    start_from: str | Path | None,
    reason: str,
    rounded: bool = False,
) -> TrainedModules:
    """Train the modules `names` in fp32, from the values that an earlier adapter has.

    Args:
        model: the PEFT model.
        names: of the base model's modules that train in addition to LoRA.
        start_from: folder or name of the adapter that the run continues from, where PEFT loaded
            it: into copies in the base model's dtype, which rounds them.
        reason: why a module of `names` may not train.
        rounded: whether TRL attached the adapter, and rounded it to bf16.

    Raises:
        ValueError: some would not train, or the earlier adapter does not fit.
    """
    untrained = untrained_modules(model, names)
    if untrained:
        raise ValueError(
            f"longlora: {{trainable: …}} asks for {len(untrained)} modules that would not "
            f"train ({some(untrained)}): {reason}. Write "
            "longlora: {trainable: []}, or start without it"
        )
    if rounded:
        undo_rounding(model)
    trained = train_in_fp32(model)
    if start_from:
        try:
            load_adapter_state(model, read_adapter_state(start_from))
        except ValueError as error:
            raise ValueError(f"lora_model_dir: {start_from}: {error}") from error
    return trained

"""Names and shapes in adapter and model folders, and the base model without weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

ADAPTER_FILE = "adapter_model.safetensors"


PREFIX = "base_model.model."


INDEX = "model.safetensors.index.json"


WHOLE = "model.safetensors"


def model_without_weights(base_config: Any) -> Any:
    """The base model without weights (meta tensors); None where transformers cannot build one."""
    import copy

    import torch
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(base_config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except (ValueError, KeyError, ImportError):
        return None  # not a plain causal language model


def tied_names(base: Any) -> dict[str, set[str]]:
    """Name → every name of the same parameter, for parameters that have several."""
    groups: dict[int, set[str]] = {}
    for name, parameter in base.named_parameters(remove_duplicate=False) if base else ():
        groups.setdefault(id(parameter), set()).add(name)
    return {name: group for group in groups.values() if len(group) > 1 for name in group}


def shards_of(folder: Path) -> list[Path]:
    """The safetensors files of a model, in the order of their names."""
    return sorted(folder.glob("*.safetensors"))


def shapes_of(shard: Path) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor of a safetensors file; reads its header only."""
    from safetensors import safe_open

    with safe_open(shard, framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def adapter_shapes(adapter_dir: Path) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor of a PEFT adapter, in either file format."""
    if (adapter_dir / ADAPTER_FILE).is_file():
        return shapes_of(adapter_dir / ADAPTER_FILE)
    from longlora_plugin.adapter.state import read_adapter_state

    return {name: tuple(tensor.shape) for name, tensor in read_adapter_state(adapter_dir).items()}


def is_readable(shard: Path) -> bool:
    """Whether a safetensors file has a whole header that matches its size."""
    from safetensors import SafetensorError

    try:
        shapes_of(shard)
    except SafetensorError:
        return False
    return True

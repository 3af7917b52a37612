"""Whole fp32 adapters from training that spreads or rounds them, and back.

DeepSpeed rounds a bf16 run's parameters to bf16 and keeps its fp32 masters in the optimizer, so
what it saves has lost every update of relative size 2⁻⁹ or less: at the paper's learning rate all
of the norms'. FSDP2 shards masters over the processes, and its checkpoints hold no adapter. Here
the masters are gathered, whole, under the names of PEFT's files, and put back from such a file.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from longlora_plugin.checkpoints.files import ADAPTER_FILES, whole_file

WRAPPERS = ("_checkpoint_wrapped_module.", "_fsdp_wrapped_module.", "_orig_mod.")
"""What activation checkpointing, FSDP and torch.compile put into parameter names."""

ADAPTER = "default"
PREFIX = "base_model.model."
WRAPPED_IN = (
    ".base_layer",
    ".original_module",
    f".modules_to_save.{ADAPTER}",
    ".token_adapter",
)
"""What PEFT puts between a module and its tensors."""


def plain_name(name: str) -> str:
    """A PEFT model's name of a module or tensor as the base model has it."""
    name = name.removeprefix(PREFIX)
    for part in WRAPPED_IN:
        name = f".{name}".replace(part, "").removeprefix(".")
    return name


def name_in_file(parameter: str) -> str:
    """The name PEFT's file has for a trained parameter of a PEFT model."""
    for wrapper in WRAPPERS:
        parameter = parameter.replace(wrapper, "")
    name = re.sub(rf"(\.modules_to_save)?\.{ADAPTER}(?=\.|$)", "", parameter)
    # PEFT kept the name DoRA's magnitudes had when they were no module.
    return re.sub(r"(\.lora_magnitude_vector)\.weight$", r"\1", name)


def _names_of_trained(model: torch.nn.Module) -> dict[Any, list[str]]:
    """Trained parameter → its names in PEFT's file; a tied one has several."""
    names: dict[Any, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            names.setdefault(parameter, []).append(name_in_file(name))
    return names


def gather_adapter_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every trained tensor, whole, in fp32, on the CPU. All processes must call it.

    Returns:
        Name in PEFT's file → tensor; empty on every process but the first.
    """
    first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    whole: dict[str, torch.Tensor] = {}
    for parameter, names in _names_of_trained(model).items():
        tensor = _whole(parameter)
        if first:
            for name in names:
                whole[name] = tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
    return whole


def load_adapter_state(model: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Set every trained parameter, or DeepSpeed's master of it, to a saved tensor's exact value.

    Raises:
        ValueError: a tensor is missing or has another shape; nothing was set.
    """
    trained = _names_of_trained(model)
    missing = sorted(names[0] for names in trained.values() if not tensors.keys() & set(names))
    if missing:
        raise ValueError(
            f"the adapter lacks {len(missing)} of the {len(trained)} tensors that this recipe "
            f"trains: {some(missing)}; it was trained with other lora_target_modules or "
            "longlora: {trainable: …}"
        )
    found = {each: next(n for n in names if n in tensors) for each, names in trained.items()}
    wrong = [
        f"{name} is {tuple(tensors[name].shape)}, the model's {tuple(_shape(parameter))}"
        for parameter, name in found.items()
        if tensors[name].shape != _shape(parameter)
    ]
    if wrong:
        raise ValueError(f"the adapter belongs to another base model: {some(wrong)}")
    with torch.no_grad():
        for parameter, name in found.items():
            if _is_deepspeeds(parameter):
                from deepspeed.utils import safe_set_full_fp32_param

                value = tensors[name].to(parameter.device, torch.float32)
                safe_set_full_fp32_param(parameter, value)
            else:
                parameter.copy_(tensors[name])


def read_adapter_state(folder: str | Path, **hub: Any) -> dict[str, torch.Tensor]:
    """The tensors of an adapter's folder, as saved, or of a hub repository (`revision`, …)."""
    from peft.utils import load_peft_weights

    return load_peft_weights(str(folder), device="cpu", **hub)


def match_rows(model: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    """Give a base model as many rows of embeddings as an adapter's tensors have.

    Training with added tokens makes the table longer, and PEFT then refuses the base model.

    Args:
        tensors: of the adapter, as saved.
    """
    rows = _rows(model, tensors)
    if rows is not None and rows != model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(rows, mean_resizing=False)


def embedding_tables(model: Any) -> set[str]:
    """Names of the embeddings and the output head of a base or PEFT model, as the base has them."""
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    return {
        plain_name(name)
        for name, module in model.named_modules()
        if any(module is table for table in tables)
    }


def shrink_saved_adapter(
    folder: Path, tables: Collection[str], *, base_rows: int, dtype: torch.dtype
) -> None:
    """Make the file of a finished adapter smaller.

    PEFT saves a copy of the base model's own embeddings with LoRA on them; where these have the
    rows that they had, the base model is enough.

    Args:
        tables: as `embedding_tables` names them.
        base_rows: of the base model's embeddings.
        dtype: what trained embeddings are rounded to; wider than they are leaves them.
    """
    from safetensors.torch import load_file

    file = folder / ADAPTER_FILES[0]
    if not file.is_file():
        return
    tensors = load_file(file)
    kept = {}
    for saved, tensor in tensors.items():
        is_table = plain_name(saved).removesuffix(".weight") in tables and "lora_" not in saved
        if is_table and ".base_layer." in saved and tensor.shape[0] == base_rows:
            continue
        narrower = is_table and dtype.itemsize < tensor.element_size()
        kept[saved] = tensor.to(dtype) if narrower else tensor
    if any(kept.get(saved) is not tensor for saved, tensor in tensors.items()):
        save_adapter_state(folder, kept)


def _rows(model: Any, tensors: Mapping[str, torch.Tensor]) -> int | None:
    """Rows of embeddings or output head in an adapter; None where it has neither."""
    names = embedding_tables(model)
    for saved, tensor in tensors.items():
        for name in names:
            field = plain_name(saved).removeprefix(f"{name}.")
            if field in ("weight", "lora_B.weight"):
                return int(tensor.shape[0])
            if field == "lora_embedding_A":
                return int(tensor.shape[1])
    return None


def save_adapter_state(
    folder: Path, tensors: Mapping[str, torch.Tensor], *, into: bool = False
) -> None:
    """Write an adapter's tensors; an existing file is replaced only by a complete one.

    Args:
        into: keep what else an existing file holds. PEFT saves an output head in addition to
            embeddings that new tokens made longer.
    """
    from safetensors.torch import load_file, save_file

    folder.mkdir(parents=True, exist_ok=True)
    file = folder / ADAPTER_FILES[0]
    if into and file.is_file():
        tensors = {**load_file(file), **tensors}
    with whole_file(file) as partial:
        save_file(dict(tensors), partial, metadata={"format": "pt"})


def save_adapter(model: Any, folder: Path) -> None:
    """Write the whole fp32 adapter and its config, anew. All processes must call it."""
    tensors = gather_adapter_state(model)
    if tensors:
        save_adapter_state(folder, tensors)
        config = copy.copy(model.peft_config[model.active_adapter])
        config.inference_mode = True  # as PEFT saves it
        config.save_pretrained(str(folder))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def _whole(parameter: Any) -> torch.Tensor:
    if _is_deepspeeds(parameter):
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(parameter)
    if hasattr(parameter, "full_tensor"):
        return parameter.full_tensor()
    return parameter.data


def _is_deepspeeds(parameter: Any) -> bool:
    return hasattr(parameter, "_hp_mapping") or hasattr(parameter, "_z3_optimizer")


def _shape(parameter: Any) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)


def some(items: Sequence[str]) -> str:
    """The first three items of a list, and how many more there are."""
    more = f" and {len(items) - 3} more" if len(items) > 3 else ""
    return ", ".join(items[:3]) + more

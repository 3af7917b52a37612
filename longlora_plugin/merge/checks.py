"""Before a merge: what cannot be merged is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longlora_plugin.checkpoints.files import checkpoints, why_no_adapter


def check_adapter_folder(folder: Path) -> None:
    """Raise ValueError unless a folder holds a complete adapter; name the last good checkpoint."""
    problem = why_no_adapter(folder)
    if problem is None:
        return
    good = [each for each in checkpoints(folder) if why_no_adapter(each) is None]
    hint = (
        f"the last checkpoint with one is {good[-1]}: write lora_model_dir: {good[-1]}"
        if good
        else "train first, or write lora_model_dir: <folder of the adapter>"
    )
    raise ValueError(f"nothing to merge: {folder} holds no adapter: {problem}; {hint}")


def check_not_quantized(base_model: str, stored: str | None, merges: bool) -> None:
    """Raise ValueError where the base's own weights are quantized and the merge cannot undo that.

    Args:
        stored: its `quantization_method`.
        merges: whether Axolotl's merge, with the method asked for, knows such a base.
    """
    if stored is None or merges:
        return
    raise ValueError(
        f"cannot merge into a quantized base: base_model: {base_model} is stored in "
        f"{stored}. Write base_model: <the 16-bit model it was made "
        "from>; the adapter stays as it is (load_in_4bit and load_in_8bit need no change)"
    )


def quantization_method(base_config: Any) -> str | None:
    """How a base's weights are stored, as its config says; None for plain ones."""
    quantization = getattr(base_config, "quantization_config", None)
    if not quantization:
        return None
    if not isinstance(quantization, Mapping):
        quantization = quantization.to_dict()
    method = str(quantization.get("quant_method") or "an unnamed format")
    if method == "bitsandbytes":
        method += " 8-bit" if quantization.get("load_in_8bit") else " 4-bit"
    return method


def local_folder(base_model: str, revision: str | None = None) -> Path:
    """The folder of a base model, by its path, or by its name, downloaded if need be."""
    if Path(base_model).is_dir():
        return Path(base_model)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(base_model, revision=revision))

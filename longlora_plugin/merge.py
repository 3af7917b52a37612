"""What a merged model's folder needs so that it is the model that was trained.

Axolotl's default merge copies the base model's `config.json`, and takes from an adapter's fully
trained modules the weights but not the biases. Both are put right here; everything else is
Axolotl's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ADAPTER_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."


def write_config_fields(folder: Path, fields: Mapping[str, Any]) -> bool:
    """Set fields of a folder's `config.json`; whether it changed.

    Old spellings of RoPE are removed: transformers would read them beside the new one.

    Raises:
        ValueError: the folder has no `config.json`.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no config.json: the merge did not finish")
    config = json.loads(path.read_text(encoding="utf-8"))
    changed = {**config, **fields}
    if "rope_parameters" in fields:
        for old in ("rope_scaling", "rope_theta"):
            changed.pop(old, None)
    if changed == config:
        return False
    partial = path.with_suffix(".json.partial")
    partial.write_text(json.dumps(changed, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    partial.replace(path)
    return True


def missing_full_tensors(adapter_dir: Path, merged_dir: Path) -> dict[str, Any]:
    """Fully trained tensors of an adapter that the merged folder does not hold.

    Returns:
        Name in the merged model → tensor as trained.
    """
    from safetensors import safe_open

    missing: dict[str, Any] = {}
    with safe_open(adapter_dir / ADAPTER_FILE, framework="pt") as adapter:
        full = {
            name.removeprefix(PREFIX): name
            for name in adapter.keys()  # noqa: SIM118  (safe_open is not a mapping)
            if ".lora_" not in name
        }
        for shard in sorted(merged_dir.glob("*.safetensors")):
            with safe_open(shard, framework="pt") as merged:
                for name in set(merged.keys()) & set(full):
                    trained = adapter.get_tensor(full[name])
                    held = merged.get_tensor(name)
                    if held.shape != trained.shape or not (trained.to(held.dtype) == held).all():
                        missing[name] = trained
    return missing


def write_full_tensors(merged_dir: Path, tensors: Mapping[str, Any]) -> None:
    """Replace tensors in the merged folder's shards, keeping each shard's dtype and metadata."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    for shard in sorted(merged_dir.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as merged:
            metadata, names = merged.metadata(), set(merged.keys())
        ours = names & set(tensors)
        if not ours:
            continue
        held = load_file(shard)
        held.update({name: tensors[name].to(held[name].dtype) for name in ours})
        partial = shard.with_suffix(".partial")
        save_file(held, partial, metadata=metadata)
        partial.replace(shard)

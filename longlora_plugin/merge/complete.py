"""After Axolotl's merge: the folder becomes the model that was trained.

Its default method copies the base's `config.json` and tokenizer, takes from fully trained modules
the weights but not the biases, and in Axolotl 0.19 rounds the output head of a 4-bit run to NF4,
which no training saw. `complete` puts each right; everything else is Axolotl's.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longlora_plugin.checkpoints.files import whole_file, write_json
from longlora_plugin.merge.tensors import (
    ADAPTER_FILE,
    INDEX,
    PREFIX,
    WHOLE,
    model_without_weights,
    shapes_of,
    shards_of,
    tied_names,
)
from longlora_plugin.rope import write_rope

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


def complete(
    adapter_dir: Path,
    merged_dir: Path,
    base_dir: Path,
    base_config: Any,
    *,
    config_fields: Mapping[str, Any],
    base_context: int,
    target_context: int,
) -> list[str]:
    """Make a merged folder the model that was trained. A second call changes nothing.

    Args:
        adapter_dir: the adapter that was merged.
        merged_dir: what Axolotl's merge wrote.
        base_dir: the base model's folder.
        base_config: its transformers config.
        config_fields: `rope_parameters` and `max_position_embeddings` of the run; {} keeps them.
        base_context, target_context: tokens before and after the extension.

    Returns:
        A line for each thing that was put right.

    Raises:
        ValueError: the folder has no weights or no config, or a trained tensor has no place in it.
    """
    notes = []
    _name_for_loaders(merged_dir)
    stale = remove_stale_weights(merged_dir)
    if stale:
        notes.append(f"removed weights of an earlier merge: {', '.join(stale)}")
    if config_fields:
        write_config_fields(merged_dir, config_fields)
        notes.append(f"config.json has {dict(config_fields)}")
    wrong = wrong_tensors(adapter_dir, merged_dir, base_dir, base_config)
    if wrong:
        write_tensors(merged_dir, wrong)
        notes.append(f"put right {len(wrong)} tensors that the merge left out or rounded")
    for name in TOKENIZER_FILES:
        if (adapter_dir / name).is_file():
            _copy(adapter_dir / name, merged_dir / name)
    # The older method sets do_sample in it.
    if (base_dir / "generation_config.json").is_file():
        _copy(base_dir / "generation_config.json", merged_dir / "generation_config.json")
    if config_fields:
        notes += _raise_limits(merged_dir, base_context, target_context)
    return notes


def write_config_fields(folder: Path, fields: Mapping[str, Any]) -> bool:
    """Set fields of a folder's `config.json`; whether it changed.

    RoPE is written in both spellings.

    Raises:
        ValueError: the folder has no `config.json`.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no config.json: the merge did not finish")
    config = json.loads(path.read_text(encoding="utf-8"))
    changed = {**config, **fields}
    if "rope_parameters" in fields:
        changed = write_rope(changed, fields["rope_parameters"], fields["max_position_embeddings"])
    if changed == config:
        return False
    write_json(path, changed)
    return True


def local_folder(base_model: str, revision: str | None = None) -> Path:
    """The folder of a base model, by its path, or by its name where it has been downloaded."""
    if Path(base_model).is_dir():
        return Path(base_model)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(base_model, revision=revision, local_files_only=True))


def _name_for_loaders(folder: Path) -> None:
    """Of a base with one pytorch_model.bin the merge makes a file that no loader looks for."""
    odd = folder / "pytorch_model.safetensors"
    if odd.is_file():
        odd.replace(folder / WHOLE)


def remove_stale_weights(folder: Path) -> list[str]:
    """Delete weight files that an earlier merge, with other files, left behind; their names.

    The newer of the whole file and the index is this merge's; loaders disagree which they take.
    """
    index, whole = folder / INDEX, folder / WHOLE
    shards = {path.name for path in folder.glob("*model-*-of-*.safetensors")}
    if not whole.is_file() and not index.is_file():
        raise ValueError(f"{folder} has no {WHOLE}: the merge did not finish")
    if whole.is_file() and (
        not index.is_file() or whole.stat().st_mtime_ns >= index.stat().st_mtime_ns
    ):
        stale = shards | ({INDEX} if index.is_file() else set())
    else:
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        stale = (shards | ({WHOLE} if whole.is_file() else set())) - set(listed)
    for name in stale:
        (folder / name).unlink()
    return sorted(stale)


def wrong_tensors(
    adapter_dir: Path, merged_dir: Path, base_dir: Path, base_config: Any
) -> dict[str, Any]:
    """Tensors of a merged folder that are not what the trained model has.

    Fully trained ones must be the adapter's. Embeddings and output head, where the adapter says
    nothing of them, must be the base's: bitsandbytes never quantizes them.

    Returns:
        Name in the merged folder → the right tensor.

    Raises:
        ValueError: a fully trained tensor has no place in the folder.
    """
    from safetensors import safe_open

    places = {name: shard for shard in shards_of(merged_dir) for name in shapes_of(shard)}
    adapter_file = adapter_dir / ADAPTER_FILE
    if not adapter_file.is_file():
        return {}  # an old adapter_model.bin: LoRA and weights only, which Axolotl merges
    base = model_without_weights(base_config)
    ties = tied_names(base)
    right: dict[str, Any] = {}
    touched: set[str] = set()
    unplaced = []
    with safe_open(adapter_file, framework="pt") as adapter:
        for saved in adapter.keys():  # noqa: SIM118  (safe_open is not a mapping)
            name = saved.removeprefix(PREFIX)
            if ".lora_" in name:
                touched.add(name.split(".lora_")[0] + ".weight")
                continue
            placed = [each for each in ties.get(name, {name}) if each in places]
            if not placed:
                unplaced.append(name)
            for place in placed:
                touched.add(place)
                tensor = adapter.get_tensor(saved)
                if not _holds(places[place], place, tensor):
                    right[place] = tensor
    if unplaced:
        raise ValueError(
            f"the merge lost {len(unplaced)} trained tensors ({', '.join(sorted(unplaced)[:3])}): "
            f"{merged_dir} has none of these names. Merge with merge_method: legacy"
        )
    originals = {name: shard for shard in shards_of(base_dir) for name in shapes_of(shard)}
    for name in (_tables(base) & places.keys() & originals.keys()) - touched:
        with safe_open(originals[name], framework="pt") as shard:
            tensor = shard.get_tensor(name)
        if not _holds(places[name], name, tensor):
            right[name] = tensor
    return right


def write_tensors(merged_dir: Path, tensors: Mapping[str, Any]) -> None:
    """Replace tensors in the merged folder's shards, keeping each shard's dtype and metadata."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    for shard in shards_of(merged_dir):
        ours = shapes_of(shard).keys() & tensors.keys()
        if not ours:
            continue
        with safe_open(shard, framework="pt") as merged:
            metadata = merged.metadata()
        held = load_file(shard)
        held.update({name: tensors[name].to(held[name].dtype) for name in ours})
        with whole_file(shard) as partial:
            save_file(held, partial, metadata=metadata)


def _tables(base: Any) -> set[str]:
    """Names of the embedding and output weights."""
    if base is None:
        return set()
    tables = (base.get_input_embeddings(), base.get_output_embeddings())
    return {
        f"{name}.weight"
        for name, module in base.named_modules()
        if any(module is table for table in tables)
    }


def _holds(shard: Path, name: str, tensor: Any) -> bool:
    from safetensors import safe_open

    with safe_open(shard, framework="pt") as merged:
        held = merged.get_tensor(name)
    return held.shape == tensor.shape and bool((tensor.to(held.dtype) == held).all())


def _raise_limits(folder: Path, base: int, target: int) -> list[str]:
    """Raise limits that repeat the old context, or generation would stop where the base's did."""
    notes = []
    for file, key in (("generation_config.json", "max_length"), ("tokenizer_config.json", None)):
        path = folder / file
        if not path.is_file():
            continue
        key = key or "model_max_length"
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.get(key) == base != target:
            write_json(path, {**content, key: target})
            notes.append(f"{file} has {key}: {target}")
    return notes


def _copy(source: Path, target: Path) -> None:
    with whole_file(target) as partial:
        shutil.copyfile(source, partial)

"""Checkpoints of the original LongLoRA project, made into standard PEFT adapters.

Its scripts left two layouts: `adapter_model` (LoRA) with `trainable_params` (embeddings and norms)
and `adapter_config.json`; or the whole wrapped model, from which its `get_trainable_weights.py` had
to be run first. Each as `.bin` or safetensors, the whole model also in shards; names may begin with
`module.`, as data-parallel wrappers write them. Neither says how RoPE was scaled, so the
models answer garbage until someone remembers to: position interpolation with the factor
⌈context / original context⌉ (LongLoRA, section 4.1).
"""

from __future__ import annotations

import pickle
import re
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longlora_plugin.checkpoints.files import TOKENIZER_FILES, read_json, whole_file, write_json

PREFIX = "base_model.model."
LORA_FILE, TRAINED_FILE, WHOLE_FILE = "adapter_model", "trainable_params", "pytorch_model"
WHOLE_FILES = (WHOLE_FILE, "model")
TRAINED_PARTS = ("embed", "norm")
"""What the original trained in addition to LoRA: every weight with one of these in its name."""
SELECTS_LAYERS = ("target_modules", "layers_to_transform", "layers_pattern", "exclude_modules")
ORIGINAL_ALPHA = 16
"""α of the original's recipes, for a checkpoint without adapter_config.json."""


@dataclass(frozen=True)
class Imported:
    """What an import made.

    Attributes:
        lora: number of LoRA tensors.
        trained: number of embedding and norm tensors.
        context: context that RoPE was set for; None where it is not known, and no config written.
        notes: what a user should know.
    """

    lora: int
    trained: int
    context: int | None
    notes: tuple[str, ...]


def import_checkpoint(
    source: Path,
    target: Path,
    *,
    base_model: str | None = None,
    context: int | None = None,
) -> Imported:
    """Write an original checkpoint as a PEFT adapter with safetensors and a config with RoPE.

    Args:
        source: folder of an original checkpoint.
        target: folder to write; must not hold an adapter.
        base_model: folder or name of the base; default: what adapter_config.json says.
        context: tokens it was trained for; default: what config.json or the folder's name says.

    Raises:
        ValueError: the folder holds no checkpoint, a file is not plain tensors, shapes contradict
            each other or the base, or `target` already holds an adapter.
    """
    if (target / "adapter_config.json").exists():
        raise ValueError(f"{target} already holds an adapter; name a new folder")
    lora, trained = _tensors(source)
    adapter_config = _adapter_config(source, lora, trained)
    base_model = base_model or adapter_config.get("base_model_name_or_path")
    notes: list[str] = []
    if base_model is None:
        notes.append("the checkpoint does not name its base model; give --base-model")
    adapter_config["base_model_name_or_path"] = base_model
    config = None
    context = context or _context(source)
    if context is None:
        notes.append(
            "how far its context was extended is not recorded, so no config.json was written and "
            "RoPE stays unscaled; give --context TOKENS"
        )
    elif base_model is not None:
        config = _extended_config(base_model, context, notes)
        if config is not None:
            _check_against_base(config, trained, notes)

    from safetensors.torch import save_file

    target.mkdir(parents=True, exist_ok=True)
    tensors = {
        PREFIX + name: tensor.contiguous().clone() for name, tensor in {**lora, **trained}.items()
    }
    with whole_file(target / "adapter_model.safetensors") as partial:
        save_file(tensors, partial, metadata={"format": "pt"})
    if config is not None:
        config.save_pretrained(target)
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    # Last: a folder with this file is a complete adapter.
    write_json(target / "adapter_config.json", adapter_config)
    return Imported(len(lora), len(trained), context if config is not None else None, tuple(notes))


def _tensors(source: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """LoRA tensors and fully trained tensors, named as in the base model."""
    if _files(source, LORA_FILE):
        lora, trained = _load(source, LORA_FILE), _load(source, TRAINED_FILE)
        if not trained:
            raise ValueError(
                f"{source} has {LORA_FILE} but no {TRAINED_FILE}: the trained embeddings and norms "
                f"are missing. They are in the {WHOLE_FILE}.bin of the same run; put it there"
            )
    else:
        whole = next(filter(None, (_load(source, name) for name in WHOLE_FILES)), None)
        if whole is None:
            raise ValueError(
                f"{source} holds no LongLoRA checkpoint: expected {LORA_FILE} with {TRAINED_FILE}, "
                f"or {WHOLE_FILE} (.bin or .safetensors, whole or in shards)"
            )
        lora = {name: tensor for name, tensor in whole.items() if "lora_" in name}
        trained = {
            name: tensor
            for name, tensor in whole.items()
            if "lora_" not in name and any(part in name for part in TRAINED_PARTS)
        }
    if not lora:
        raise ValueError(f"{source} holds no LoRA tensors (lora_A, lora_B)")
    for name, tensor in lora.items():
        pair = lora.get(name.replace("lora_A", "lora_B") if "lora_A" in name else "")
        if "lora_A" in name and (pair is None or pair.shape[1] != tensor.shape[0]):
            raise ValueError(f"{source}: {name} has no lora_B of the same rank")
    return lora, trained


def _plain_name(name: str) -> str:
    while name.startswith(("module.", PREFIX)):
        name = name.removeprefix("module.").removeprefix(PREFIX)
    return name.replace(".default", "").replace(".base_layer", "")


def _files(source: Path, stem: str) -> list[Path]:
    """One file, or its shards (`pytorch_model-00001-of-00002.bin`), all of them."""
    for suffix in (".safetensors", ".bin"):
        whole = source / f"{stem}{suffix}"
        if whole.is_file():
            return [whole]
        shards = sorted(source.glob(f"{stem}-*-of-*{suffix}"))
        if shards:
            total = int(shards[0].stem.rsplit("-", 1)[-1])
            if len(shards) != total:
                raise ValueError(f"{source} holds {len(shards)} of {total} shards of {stem}")
            return shards
    return []


def _load(source: Path, stem: str) -> dict[str, Any]:
    tensors = (each for path in _files(source, stem) for each in _read(path).items())
    return {_plain_name(name): tensor for name, tensor in tensors}


def _read(path: Path) -> Mapping[str, Any]:
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} was refused: it holds more than tensors, which can run code when loaded. "
            f"Get the file from a source you trust, or convert it there ({error})".splitlines()[0]
        ) from None
    except (RuntimeError, EOFError, OSError, SafetensorError) as error:
        raise ValueError(f"{path} is damaged or cut off: {error}") from None
    if not isinstance(content, Mapping) or not all(
        isinstance(value, torch.Tensor) for value in content.values()
    ):
        raise ValueError(f"{path} is not a mapping from names to tensors")
    return content


def _adapter_config(
    source: Path, lora: Mapping[str, Any], trained: Mapping[str, Any]
) -> dict[str, Any]:
    path = source / "adapter_config.json"
    config = read_json(path) if path.is_file() else {}
    ranks = {tensor.shape[0] for name, tensor in lora.items() if "lora_A" in name}
    if len(ranks) != 1 or config.get("r", min(ranks)) not in ranks:
        raise ValueError(
            f"{source}: the LoRA tensors have rank {sorted(ranks)}, adapter_config.json says "
            f"{config.get('r')}"
        )
    modules = {name.rsplit(".", 1)[0].rsplit(".", 1)[-1] for name in trained}
    return {
        "lora_alpha": ORIGINAL_ALPHA,
        "lora_dropout": 0.0,
        "bias": "none",
        "task_type": "CAUSAL_LM",
        **{key: value for key, value in config.items() if key not in SELECTS_LAYERS},
        "target_modules": _targets(lora),
        "peft_type": "LORA",
        "r": ranks.pop(),
        "inference_mode": True,
        "modules_to_save": sorted(modules) or None,
    }


def _targets(lora: Mapping[str, Any]) -> list[str]:
    """What has LoRA by the tensors themselves; the config may say less than was trained."""
    modules = {name.split(".lora_")[0] for name in lora}
    counts = Counter(module.rsplit(".", 1)[-1] for module in modules)
    in_every_layer = len(set(counts.values())) == 1
    return sorted(counts) if in_every_layer else sorted(modules)


def _context(source: Path) -> int | None:
    """The trained context, from a config.json next to the checkpoint or the folder's name."""
    from longlora_plugin.rope.base_config import (
        extended_layer,
        linear_maximum_of,
        maximum_of,
        rope_parameters_of,
        text_config_of,
    )

    path = source / "config.json"
    config = text_config_of(read_json(path)) if path.is_file() else None
    layer = extended_layer(rope_parameters_of(config))[1] if config else {}
    longest = maximum_of(config)
    if longest and layer.get("rope_type") == "linear":
        # The original kept the base's maximum beside its factor, others raise it.
        raised = linear_maximum_of(layer, longest) == "scaled"
        return longest if raised else round(longest * float(layer["factor"]))
    named = re.findall(r"(?:^|[-_])(\d+)k(?:[-_]|$)", source.resolve().name, flags=re.IGNORECASE)
    return int(named[-1]) * 1024 if named else None


def _extended_config(base_model: str, context: int, notes: list[str]) -> Any:
    from transformers import AutoConfig

    from longlora_plugin.rope import apply_rope, resolve_rope

    try:
        config = AutoConfig.from_pretrained(base_model)
    except (OSError, ValueError):
        notes.append(
            f"the config of {base_model} could not be read, so no config.json was written; give "
            "--base-model FOLDER"
        )
        return None
    apply_rope(config, resolve_rope("linear", config, context))
    return config


def _check_against_base(config: Any, trained: Mapping[str, Any], notes: list[str]) -> None:
    text = config.get_text_config()
    for name, tensor in trained.items():
        if tensor.shape[-1] != text.hidden_size:
            raise ValueError(
                f"the checkpoint belongs to another base model: {name} has {tensor.shape[-1]} "
                f"columns, the base's hidden size is {text.hidden_size}"
            )
        if "embed" in name and tensor.shape[0] != text.vocab_size:
            notes.append(
                f"its embedding has {tensor.shape[0]} rows, the base {text.vocab_size}: call "
                f"model.resize_token_embeddings({tensor.shape[0]}) before loading the adapter; "
                "axolotl merge-lora does it by itself"
            )
            text.vocab_size = tensor.shape[0]

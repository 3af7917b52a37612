"""The models that a recipe names: its base, the base with the recipe's RoPE, and what it trained.

A model is described first and loaded later, one at a time: descriptions are enough to find out
which rows of a results file are still missing.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longlora_plugin.run.recipe import Recipe

BASE, BASE_ROPE, ADAPTER, TRAINED, MERGED = "base", "base+rope", "adapter", "trained", "merged"
LABELS = (BASE, BASE_ROPE, ADAPTER, TRAINED, MERGED)
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class ModelSource:
    """A model to load.

    Attributes:
        label: what results call it.
        weights: folder or hub name of the weights.
        config: transformers config to build it with.
        adapter: folder of a PEFT adapter to put on it.
        load_options: further options of `from_pretrained`.
    """

    label: str
    weights: str
    config: Any
    adapter: Path | None = None
    load_options: dict[str, Any] = field(default_factory=dict)

    def load(self, device: Any, dtype: Any) -> Any:
        """The model on `device`, in evaluation mode, with PyTorch's own attention (sdpa)."""
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(
            self.weights,
            config=copy.deepcopy(self.config),
            dtype=dtype,
            attn_implementation="sdpa",
            **self.load_options,
        )
        if self.adapter is not None:
            from peft import PeftModel

            _match_vocabulary(model, self.adapter)
            model = PeftModel.from_pretrained(model, str(self.adapter))
        return model.to(device).eval()

    @property
    def rope(self) -> dict[str, Any]:
        """The `rope_parameters` it runs with."""
        return dict(getattr(self.config.get_text_config(), "rope_parameters", None) or {})

    def identity(self) -> dict[str, Any]:
        """What tells this model from another: weights, adapter and RoPE."""
        return {
            "weights": _fingerprint(self.weights, self.config),
            "adapter": None if self.adapter is None else _fingerprint(str(self.adapter), None),
            "rope": json.loads(json.dumps(self.rope, sort_keys=True, default=str)),
        }


def model_sources(
    recipe: Recipe, labels: Sequence[str] = (), *, adapter: str | Path | None = None
) -> list[ModelSource]:
    """The models of a recipe.

    Args:
        labels: `base`, `base+rope`, `adapter`, `trained` (full fine-tune), `merged`, or
            `name=folder` for any other model or adapter; empty for all of the first four that
            exist. `base+rope` exists where the recipe's RoPE differs from the base model's.
        adapter: folder of the adapter instead of the recipe's output_dir.

    Raises:
        ValueError: a model that is asked for does not exist.
    """
    config = recipe.base_config()
    extended = extended_config(recipe, config)
    options: dict[str, Any] = {}
    if recipe.raw.get("trust_remote_code") is True:
        options["trust_remote_code"] = True
    if recipe.raw.get("revision_of_model"):
        options["revision"] = recipe.raw["revision_of_model"]

    def base(label: str, with_config: Any, with_adapter: Path | None = None) -> ModelSource:
        return ModelSource(label, recipe.base_model, with_config, with_adapter, options)

    output = recipe.output_dir
    adapter_folder = Path(adapter) if adapter is not None else output
    found = {BASE: base(BASE, config)}
    if rope_of(extended) != rope_of(config):
        found[BASE_ROPE] = base(BASE_ROPE, extended)
    if is_adapter(adapter_folder):
        found[ADAPTER] = base(ADAPTER, extended, adapter_folder)
    elif adapter is not None:
        raise ValueError(
            f"--adapter {adapter} has no {ADAPTER_CONFIG} with {ADAPTER_WEIGHTS}; give the folder "
            "that training wrote"
        )
    if is_model(output) and not is_adapter(output):
        found[TRAINED] = _own_config(TRAINED, output, options)

    if not labels:
        return list(found.values())
    if is_model(output / MERGED):
        found[MERGED] = _own_config(MERGED, output / MERGED, options)
    sources = []
    for label in labels:
        name, separator, folder = label.partition("=")
        if separator:
            if is_adapter(Path(folder)):
                sources.append(base(name, extended, Path(folder)))
            else:
                sources.append(_own_config(name, folder, options))
        elif label in found:
            sources.append(found[label])
        else:
            raise ValueError(_missing(label, recipe, adapter_folder, found))
    return sources


def rope_notes(sources: Sequence[ModelSource]) -> list[str]:
    """What to tell of adapters whose run wrote another RoPE into its config than they get here."""
    notes = []
    for source in sources:
        written = source.adapter and source.adapter / "config.json"
        if not written or not written.is_file():
            continue
        trained = json.loads(written.read_text(encoding="utf-8")).get("rope_parameters")
        if trained is not None and trained != source.rope:
            notes.append(
                f"{source.label} was trained with rope_parameters {trained} ({written}), but the "
                f"recipe now gives {source.rope}, and that is what is measured: set the recipe's "
                "rope back, or train again"
            )
    return notes


def extended_config(recipe: Recipe, base_config: Any) -> Any:
    """The base model's config with the RoPE that the recipe trains with."""
    config = copy.deepcopy(base_config)
    block = recipe.block
    if block is None or block.rope_preset == "none":
        return config
    from longlora_plugin.rope import apply_rope, resolve_rope

    settings = resolve_rope(
        block.rope_preset,
        base_config,
        recipe.sequence_len,
        original_context=block.original_context,
        **block.rope_options,
    )
    apply_rope(config, settings)
    return config


def base_context(recipe: Recipe, base_config: Any) -> int:
    """Tokens that the base model handles before the recipe extends it."""
    from longlora_plugin.rope import base_context_of

    if recipe.block is not None and recipe.block.original_context is not None:
        return recipe.block.original_context
    return base_context_of(base_config)


def rope_of(config: Any) -> tuple[Any, Any]:
    """What decides positions: `rope_parameters` and the maximum, which `dynamic` depends on."""
    text = config.get_text_config()
    return getattr(text, "rope_parameters", None), getattr(text, "max_position_embeddings", None)


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a trained PEFT adapter."""
    return (folder / ADAPTER_CONFIG).is_file() and (folder / ADAPTER_WEIGHTS).is_file()


def is_model(folder: Path) -> bool:
    """Whether a folder holds a whole model."""
    return (folder / "config.json").is_file() and any(_weight_files(folder))


def choose_dtype(raw: dict[str, Any], device: Any) -> Any:
    """float32 on a CPU; elsewhere what the recipe trains in, bfloat16 where it leaves it open."""
    import torch

    if torch.device(device).type == "cpu":
        return torch.float32
    bf16 = raw.get("bf16", "auto")
    if bf16 in (True, "auto", "full") and not raw.get("fp16"):
        return torch.bfloat16
    return torch.float16 if raw.get("fp16") else torch.float32


def load_tokenizer(recipe: Recipe) -> Any:
    """The recipe's tokenizer."""
    from transformers import AutoTokenizer

    name = recipe.raw.get("tokenizer_config") or recipe.base_model
    return AutoTokenizer.from_pretrained(
        name, trust_remote_code=recipe.raw.get("trust_remote_code") is True
    )


def _own_config(label: str, folder: str | Path, options: dict[str, Any]) -> ModelSource:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(
            str(folder), trust_remote_code=options.get("trust_remote_code", False)
        )
    except OSError:
        raise ValueError(
            f"model {label}: {folder} is neither a model folder nor an adapter folder"
        ) from None
    own = {name: value for name, value in options.items() if name != "revision"}
    return ModelSource(label, str(folder), config, None, own)


def _missing(
    label: str, recipe: Recipe, adapter_folder: Path, found: dict[str, ModelSource]
) -> str:
    reasons = {
        BASE_ROPE: "the recipe leaves the base model's RoPE as it is",
        ADAPTER: f"{adapter_folder} has no {ADAPTER_CONFIG} with {ADAPTER_WEIGHTS}; train first, "
        "or give --adapter FOLDER",
        TRAINED: f"{recipe.output_dir} has no config.json with model weights; train first",
        MERGED: f"{recipe.output_dir / MERGED} has no model; run axolotl merge-lora {recipe.path}",
    }
    if label in reasons:
        return f"no model {label!r} to evaluate: {reasons[label]}"
    return (
        f"unknown model {label!r}; here: {', '.join(found)}; another one is written NAME=FOLDER, "
        f"for example {Path(label).name or 'mine'}={label}"
    )


def _match_vocabulary(model: Any, adapter: Path) -> None:
    """Give the base as many embedding rows as the adapter's trained copy has, if it has one.

    Training with new special tokens enlarges the embedding; stock PEFT then refuses the base.
    """
    from safetensors import safe_open

    with safe_open(str(adapter / ADAPTER_WEIGHTS), framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 (a safetensors file is no mapping)
            if name.endswith(("embed_tokens.weight", "wte.weight", "embed_in.weight")):
                rows = tensors.get_slice(name).get_shape()[0]
                if rows != model.get_input_embeddings().weight.shape[0]:
                    model.resize_token_embeddings(rows, mean_resizing=False)
                return


def _weight_files(folder: Path) -> Iterable[Path]:
    for pattern in ("*.safetensors", "*.bin", "*.gguf"):
        yield from sorted(folder.glob(pattern))


def _fingerprint(name: str, config: Any) -> str:
    """Of a folder: its files of weights, by size and time; of a hub model: name and commit."""
    folder = Path(name)
    if not folder.is_dir():
        return f"{name}@{getattr(config, '_commit_hash', None)}"
    sha = hashlib.sha256()
    for file in _weight_files(folder):
        status = file.stat()
        sha.update(f"{file.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return sha.hexdigest()[:16]

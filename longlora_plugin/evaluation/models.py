"""The models of a recipe: its base, the base with the recipe's RoPE, and what it trained."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longlora_plugin.checkpoints.files import ADAPTER_CONFIG, ADAPTER_FILES, is_adapter, is_model
from longlora_plugin.evaluation.loading import ModelSource, read_adapter_config
from longlora_plugin.rope import base_context_of
from longlora_plugin.run.axolotl_keys import value_of
from longlora_plugin.run.prepare import PreparedRun, asks_for_longlora, prepare_run
from longlora_plugin.run.recipe import Recipe

BASE, BASE_ROPE, ADAPTER, TRAINED, MERGED = "base", "base+rope", "adapter", "trained", "merged"
LABELS = (BASE, BASE_ROPE, ADAPTER, TRAINED, MERGED)
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model")
SCORE_HEADS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")


def model_sources(
    recipe: Recipe,
    labels: Sequence[str] = (),
    *,
    adapter: str | Path | None = None,
    unquantized: bool = False,
    device_map: str | None = None,
) -> list[ModelSource]:
    """The models of a recipe.

    Args:
        labels: `base`, `base+rope`, `adapter`, `trained` (full fine-tune), `merged`, or
            `name=folder` for any other model or adapter; empty for all of the first four that
            exist. `base+rope` exists where the recipe's RoPE differs from the base model's.
        adapter: folder of the adapter instead of the recipe's output_dir.
        unquantized: load the base in full precision whatever the recipe says.
        device_map: of `from_pretrained`, instead of the recipe's.

    Raises:
        ValueError: a model that is asked for does not exist, or predicts no next token.
    """
    if recipe.raw.get("reward_model") or recipe.raw.get("process_reward_model"):
        raise ValueError(
            f"{recipe.path} trains a reward model: it scores a text and predicts no next token, so "
            "it has no perplexity and answers nothing; evaluate the policy model's recipe"
        )
    found = _Found(
        recipe,
        Path(adapter).expanduser() if adapter is not None else recipe.output_dir,
        {} if unquantized else _quantization(recipe.raw),
        _load_options(recipe.raw, device_map),
    )
    models = found.by_label()
    if adapter is not None and ADAPTER not in models:
        raise ValueError(
            f"--adapter {adapter} has no {ADAPTER_CONFIG} with {ADAPTER_FILES[0]}; give the folder "
            "that training wrote"
        )
    if not labels:
        return list(models.values())
    if is_model(recipe.output_dir / MERGED):
        models[MERGED] = found.own_config(MERGED, recipe.output_dir / MERGED)
    sources: list[ModelSource] = []
    for label in dict.fromkeys(labels):
        name, separator, folder = label.partition("=")
        if separator:
            source = found.anywhere(name, Path(folder).expanduser())
        elif label in models:
            source = models[label]
        else:
            raise ValueError(_missing(label, recipe, found.adapter, models))
        if any(source.label == other.label for other in sources):
            raise ValueError(
                f"two models are called {source.label!r} in --model; results are told apart by "
                "name: write NAME=FOLDER with another name"
            )
        sources.append(source)
    return sources


@dataclass(frozen=True)
class _Found:
    """What a recipe's models are built from."""

    recipe: Recipe
    adapter: Path
    quantization: dict[str, Any]
    options: dict[str, Any]

    def by_label(self) -> dict[str, ModelSource]:
        base_config = self.recipe.base_config()
        extended = self.extended(base_config)
        models = {BASE: self.base(BASE, base_config)}
        if rope_of(extended) != rope_of(base_config):
            models[BASE_ROPE] = self.base(BASE_ROPE, extended)
        if is_adapter(self.adapter):
            models[ADAPTER] = self.base(ADAPTER, extended, self.adapter)
        output = self.recipe.output_dir
        if is_model(output) and not is_adapter(output):
            models[TRAINED] = self.own_config(TRAINED, output)
        return models

    def extended(self, base_config: Any) -> Any:
        """The config that the recipe trains with."""
        return prepared_run(self.recipe, base_config).config_of(base_config)

    def base(self, label: str, config: Any, adapter: Path | None = None) -> ModelSource:
        """The recipe's base model, with an adapter or without."""
        _refuse_score_head(label, config, adapter)
        tokenizer = str(self.recipe.raw.get("tokenizer_config") or self.recipe.base_model)
        return ModelSource(
            label,
            self.recipe.base_model,
            config,
            str(adapter) if adapter is not None and _has_tokenizer(adapter) else tokenizer,
            adapter,
            self.quantization,
            self.options,
        )

    def anywhere(self, label: str, folder: Path) -> ModelSource:
        """A model or an adapter that the user names."""
        if is_adapter(folder):
            return self.base(label, self.extended(self.recipe.base_config()), folder)
        return self.own_config(label, folder)

    def own_config(self, label: str, folder: Path) -> ModelSource:
        """A whole model, as it was saved."""
        from transformers import AutoConfig

        options = {name: value for name, value in self.options.items() if name != "revision"}
        try:
            config = AutoConfig.from_pretrained(
                str(folder), trust_remote_code=options.get("trust_remote_code", False)
            )
        except OSError:
            raise ValueError(
                f"model {label}: {folder} is neither a model folder nor an adapter folder"
            ) from None
        _refuse_score_head(label, config, None)
        tokenizer = self.recipe.raw.get("tokenizer_config") or self.recipe.base_model
        if _has_tokenizer(folder) or not folder.is_dir():
            tokenizer = folder
        return ModelSource(label, str(folder), config, str(tokenizer), load_options=options)


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


def prepared_run(recipe: Recipe, base_config: Any) -> PreparedRun:
    """The recipe's run.

    Raises:
        ValueError: its RoPE cannot be decided.
    """
    run = prepare_run(recipe.raw, base_config)
    if asks_for_longlora(recipe.raw):
        run.resolved_rope()
    return run


def base_context(recipe: Recipe, base_config: Any) -> int:
    """Tokens that the base model handles before the recipe extends it."""
    return prepared_run(recipe, base_config).base_context or base_context_of(base_config)


def rope_of(config: Any) -> tuple[Any, Any]:
    """What decides positions: `rope_parameters` and the maximum, which `dynamic` depends on."""
    text = config.get_text_config()
    return getattr(text, "rope_parameters", None), getattr(text, "max_position_embeddings", None)


def choose_dtype(raw: dict[str, Any], device: Any) -> Any:
    """float32 on a CPU; elsewhere what the recipe trains in, bfloat16 where it leaves it open."""
    import torch

    if torch.device(device).type == "cpu":
        return torch.float32
    bf16 = raw.get("bf16", "auto")
    if bf16 in (True, "auto", "full") and not raw.get("fp16"):
        return torch.bfloat16
    return torch.float16 if raw.get("fp16") else torch.float32


def _refuse_score_head(label: str, config: Any, adapter: Path | None) -> None:
    what = [str(name) for name in getattr(config, "architectures", None) or []]
    kind = next((name for name in what if name.endswith(SCORE_HEADS)), None)
    if adapter is not None:
        task = read_adapter_config(adapter).get("task_type")
        kind = kind or (task if task in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS") else None)
    if kind:
        raise ValueError(
            f"model {label} is no language model ({kind}): it scores a text, such as a reward "
            "model does, and predicts no next token; leave it out, or name a causal language model"
        )


def _quantization(raw: dict[str, Any]) -> dict[str, Any]:
    """How Axolotl quantizes the base of this recipe, as options of `BitsAndBytesConfig`."""
    if not raw.get("adapter"):
        return {}
    if raw.get("load_in_4bit"):
        options = {
            "load_in_4bit": True,
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_quant_type": "nf4",
        }
        return options | (raw.get("bnb_config_kwargs") or {})
    return {"load_in_8bit": True} if raw.get("load_in_8bit") else {}


def _load_options(raw: dict[str, Any], device_map: str | None) -> dict[str, Any]:
    import torch

    options: dict[str, Any] = {}
    if raw.get("trust_remote_code") is True:
        options["trust_remote_code"] = True
    if revision := value_of(raw, "revision_of_model"):
        options["revision"] = revision
    several = torch.cuda.device_count() > 1 and int(os.environ.get("WORLD_SIZE", "1")) == 1
    if device_map := device_map or raw.get("device_map") or ("auto" if several else None):
        options["device_map"] = device_map
    return options


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def _missing(
    label: str, recipe: Recipe, adapter_folder: Path, found: dict[str, ModelSource]
) -> str:
    reasons = {
        BASE_ROPE: "the recipe leaves the base model's RoPE as it is",
        ADAPTER: f"{adapter_folder} has no {ADAPTER_CONFIG} with {ADAPTER_FILES[0]}; train first, "
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

"""The models of a recipe: its base, the base with the recipe's RoPE, and what it trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longlora_plugin.artifacts.load import config_of_adapter
from longlora_plugin.checkpoints.files import (
    ADAPTER_CONFIG,
    ADAPTER_FILES,
    is_adapter,
    is_model,
    read_json,
)
from longlora_plugin.evaluation.loading import ModelSource
from longlora_plugin.run.loading import (
    is_reward_model,
    load_options_of,
    prepared_run,
    quantization_of,
    tokenizer_of,
)
from longlora_plugin.run.recipe import Recipe

BASE, BASE_ROPE, ADAPTER, TRAINED, MERGED = "base", "base+rope", "adapter", "trained", "merged"
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
    if is_reward_model(recipe):
        raise ValueError(
            f"{recipe.path} trains a reward model: it scores a text and predicts no next token, so "
            "it has no perplexity and answers nothing; evaluate the policy model's recipe"
        )
    found = _Found(
        recipe,
        Path(adapter).expanduser() if adapter is not None else recipe.output_dir,
        {} if unquantized else quantization_of(recipe),
        load_options_of(recipe, device_map),
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
        if separator and not (name and folder):
            raise ValueError(f"--model {label}: write NAME=FOLDER")
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
        trained = is_adapter(self.adapter)
        extended, notes = self.extended(base_config, self.adapter if trained else None)
        models = {BASE: self.base(BASE, base_config)}
        if rope_of(extended) != rope_of(base_config):
            models[BASE_ROPE] = self.base(BASE_ROPE, extended)
        if trained:
            models[ADAPTER] = self.base(ADAPTER, extended, self.adapter, notes)
        output = self.recipe.output_dir
        if is_model(output) and not is_adapter(output):
            models[TRAINED] = self.own_config(TRAINED, output)
        return models

    def extended(self, base_config: Any, adapter: Path | None) -> tuple[Any, list[str]]:
        """The config that the adapter was trained with, or that the recipe will train with; and
        what the recipe says otherwise by now.
        """
        run = prepared_run(self.recipe, base_config)
        if adapter is None:
            return run.config_of(base_config), []
        return config_of_adapter(base_config, adapter, run.model_config)

    def base(
        self, label: str, config: Any, adapter: Path | None = None, notes: Sequence[str] = ()
    ) -> ModelSource:
        """The recipe's base model, with an adapter or without."""
        _refuse_score_head(label, config, adapter)
        tokenizer = tokenizer_of(self.recipe)
        return ModelSource(
            label,
            self.recipe.base_model,
            config,
            str(adapter) if adapter is not None and _has_tokenizer(adapter) else tokenizer,
            adapter,
            self.quantization,
            self.options,
            tuple(f"{label}: {note}" for note in notes),
        )

    def anywhere(self, label: str, folder: Path) -> ModelSource:
        """A model or an adapter that the user names."""
        if is_adapter(folder):
            config, notes = self.extended(self.recipe.base_config(), folder)
            return self.base(label, config, folder, notes)
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
        tokenizer = tokenizer_of(self.recipe)
        if _has_tokenizer(folder) or not folder.is_dir():
            tokenizer = str(folder)
        return ModelSource(label, str(folder), config, tokenizer, load_options=options)


def rope_of(config: Any) -> tuple[Any, Any]:
    """What decides positions: `rope_parameters` and the maximum, which `dynamic` depends on."""
    text = config.get_text_config()
    return getattr(text, "rope_parameters", None), getattr(text, "max_position_embeddings", None)


def _refuse_score_head(label: str, config: Any, adapter: Path | None) -> None:
    what = [str(name) for name in getattr(config, "architectures", None) or []]
    kind = next((name for name in what if name.endswith(SCORE_HEADS)), None)
    if adapter is not None:
        task = read_json(adapter / ADAPTER_CONFIG).get("task_type")
        kind = kind or (task if task in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS") else None)
    if kind:
        raise ValueError(
            f"model {label} is no language model ({kind}): it scores a text, such as a reward "
            "model does, and predicts no next token; leave it out, or name a causal language model"
        )


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

"""A folder with the merged model: written under another name, checked, and swapped in.

A merge that is killed leaves the earlier merged model, or no folder of that name; never a mixture.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longlora_plugin.adapter.state import match_rows, plain_name, read_adapter_state
from longlora_plugin.artifacts.manifest import FILE as MANIFEST
from longlora_plugin.artifacts.manifest import Manifest, check_files, read_manifest
from longlora_plugin.checkpoints.files import TOKENIZER_FILES, read_json, write_json
from longlora_plugin.checkpoints.run_config import config_json, trained_config
from longlora_plugin.merge import adapted, nf4
from longlora_plugin.merge.limits import raise_limits
from longlora_plugin.merge.stored import StoredWeights, files_to_load
from longlora_plugin.merge.stream import are_equal, merge_weights
from longlora_plugin.rope.base_config import (
    contexts_of,
    maximum_of,
    rope_parameters_of,
    text_config_of,
)

CARD = "README.md"
OF_A_MODEL = (".safetensors", ".bin", ".json", ".jinja", ".model", ".txt", ".py", ".partial")
"""Endings of files that belong to one merged model and do not outlive it."""
OF_THE_BASE = (
    *("training.json", "trainer_state.json", "all_results.json", "train_results.json"),
    *("eval_results.json", "params.json", MANIFEST),
)
"""Files of a base model that tell of its own training, or, Mistral's, its RoPE once more."""


LANGUAGE_MODELS = ("AutoModelForCausalLM", "AutoModelForImageTextToText")
REWARD_MODELS = ("AutoModelForSequenceClassification",)


@dataclass(frozen=True)
class Source:
    """What is merged.

    Attributes:
        adapter_dir: the adapter's folder.
        base_dir: the base model's folder.
        base_config: its transformers config.
        recipe: fields of the config that the recipe sets.
        base_contexts: the base's contexts in tokens, where the recipe knows better than the config.
        target_context: what the recipe extends to, for RoPE whose maximum stays (`dynamic`).
        quantization: keywords of the BitsAndBytesConfig that training quantized the base with; None
            if it did not. In addition `linear` and `quantize_moe_experts`, as host/compat says.
        remote_code: run the code that comes with the model.
    """

    adapter_dir: Path
    base_dir: Path
    base_config: Any
    recipe: Mapping[str, Any] = field(default_factory=dict)
    base_contexts: tuple[int, ...] = ()
    target_context: int | None = None
    quantization: Mapping[str, Any] | None = None
    remote_code: bool = False


def open_adapter(source: Source) -> adapted.AdaptedModel:
    """The adapter on its base, without the base's weights.

    Raises:
        ValueError: it cannot be merged, or belongs to another base.
    """
    import torch

    trained, _ = trained_config(source.base_config, source.adapter_dir, source.recipe)
    saved = read_json(source.adapter_dir / "adapter_config.json")
    kinds = REWARD_MODELS if saved.get("task_type") == "SEQ_CLS" else LANGUAGE_MODELS
    failures = []
    for kind in kinds:
        model = adapted.model_without_weights(trained, kind, remote=source.remote_code)
        if model is None:
            continue
        try:
            with torch.device("meta"):
                match_rows(model, read_adapter_state(source.adapter_dir))
            return adapted.AdaptedModel(model, source.adapter_dir)
        except ValueError as error:
            failures.append(str(error))
    if not failures:
        raise ValueError(f"transformers has no model for {source.base_dir} to merge into")
    made_for = saved.get("base_model_name_or_path")
    raise ValueError(
        f"the adapter in {source.adapter_dir} cannot be merged into base_model: {source.base_dir}: "
        f"{failures[0]}. It was trained on {made_for}"
    )


def merge(
    source: Source,
    target: Path,
    *,
    weights: Callable[[Path], None] | None = None,
    finish: Callable[[Path], None] | None = None,
) -> tuple[list[str], list[str]]:
    """Write the merged model to `target`, in place of an earlier one; twice is the same as once.

    Args:
        weights: writes the merged weights to a folder instead, for bases that only Axolotl merges.
        finish: completes the folder before it takes its place; an earlier model card is in it.

    Returns:
        A line for each field of the config in which the recipe is not what was trained, and for
        each thing that was done in addition to adding the adapter.

    Raises:
        ValueError: the adapter cannot be merged; an earlier folder stays as it was.
    """
    trained, others = trained_config_of(source)
    notes: list[str] = []
    raw = read_json(source.base_dir / "config.json")
    config = config_json(raw, source.base_config, trained)
    with swapped_in(target) as draft:
        if weights is None:
            model = open_adapter(source)
            config |= _rows(config, model.base)
            tied, more = merge_weights(
                source.base_dir,
                model,
                draft,
                rounding=nf4.rounding_of(source.quantization or {}),
                rounded=_rounded(source, model.base),
            )
            notes += more
            if not tied:
                config["tie_word_embeddings"] = False
                notes.append("embeddings and output head differ now: tie_word_embeddings: false")
            config["architectures"] = [type(model.base).__name__]
        else:
            _check_no_experts(source.adapter_dir)
            weights(draft)
            if "quantization_config" not in read_json(draft / "config.json"):
                config.pop("quantization_config", None)
            _check_trained(source.adapter_dir, draft)
        copy_other_files(source, draft)
        write_json(draft / "config.json", _with_dtype(config, StoredWeights(draft).dtype()))
        notes += raise_limits_of_base(source, draft)
        if finish is not None:
            _copy_card(target, source.base_dir, draft)
            finish(draft)
        check_loads(draft, remote_code=source.remote_code)
    return others, notes


def trained_config_of(source: Source) -> tuple[Any, list[str]]:
    """The trained model's config, and a line for each field in which the recipe disagrees.

    Raises:
        ValueError: it cannot be read, is another run's, or has another RoPE than the adapter's
            record.
    """
    record = read_manifest(source.adapter_dir)
    check_files(source.adapter_dir, record)
    trained, others = trained_config(source.base_config, source.adapter_dir, source.recipe)
    _check_rope(source.adapter_dir, record, trained)
    return trained, others


def _copy_card(target: Path, base_dir: Path, draft: Path) -> None:
    """The earlier merged model's card, which may have a user's words, or the base model's."""
    for folder in (target, base_dir):
        if (folder / CARD).is_file():
            shutil.copyfile(folder / CARD, draft / CARD)
            return


def _check_rope(adapter_dir: Path, record: Manifest | None, trained: Any) -> None:
    """Raise ValueError where an adapter's record names another RoPE than what it would get."""
    found = rope_parameters_of(trained)
    if record is not None and any(
        found.get(key) != value for key, value in record.rope_parameters.items()
    ):
        raise ValueError(
            f"the adapter in {adapter_dir} was trained with {record.rope_parameters}, as its "
            f"{MANIFEST} says, but would be merged with {found}: a later run wrote its config into "
            "the same folder, or the recipe has changed. Write lora_model_dir: <a checkpoint of "
            "the run you mean>, or train again"
        )


def _check_no_experts(adapter_dir: Path) -> None:
    if any("experts" in name and ".lora_" in name for name in read_adapter_state(adapter_dir)):
        raise ValueError(
            f"the adapter in {adapter_dir} has LoRA on experts, and Axolotl, which alone merges "
            "into a base stored like this one, leaves experts as they are. Write base_model: "
            "<the 16-bit model it was made from>"
        )


def _check_trained(adapter_dir: Path, merged: Path) -> None:
    """Raise ValueError unless what was trained as a whole is in weights that Axolotl merged."""
    stored = StoredWeights(merged)
    for saved, tensor in read_adapter_state(adapter_dir).items():
        name = plain_name(saved)
        if ".lora_" in saved or ".modules_to_save." in saved:
            continue
        if name not in stored or not are_equal(stored.tensor(name), tensor):
            raise ValueError(
                f"Axolotl's merge lost {name}, which the adapter trained. Write base_model: "
                "<the 16-bit model this base was made from>"
            )


def check_loads(folder: Path, *, remote_code: bool = False) -> None:
    """Load a model's folder as anyone would, on the meta device.

    Raises:
        ValueError: transformers cannot load it, or it lacks tensors or has some of another shape.
    """
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=remote_code)
    name = (config.architectures or ["AutoModelForCausalLM"])[0]
    kind = getattr(transformers, name, transformers.AutoModelForCausalLM)
    try:
        _, info = kind.from_pretrained(
            folder,
            config=config,
            device_map="meta",
            output_loading_info=True,
            trust_remote_code=remote_code,
            ignore_mismatched_sizes=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ValueError(f"transformers cannot load {folder}: {error}") from None
    wrong = [f"it has no {name}" for name in sorted(info["missing_keys"])]
    wrong += [
        f"{name} is {list(stored)}, the config's {list(built)}"
        for name, stored, built in info["mismatched_keys"]
    ]
    if wrong:
        raise ValueError(f"transformers cannot load {folder}: {'; '.join(wrong[:3])}")


def _rounded(source: Source, model: Any) -> frozenset[str]:
    settings = source.quantization
    if settings is None:
        return frozenset()
    return nf4.quantized_names(
        model,
        settings.get("llm_int8_skip_modules"),
        linear=settings.get("linear", True),
        experts=settings.get("quantize_moe_experts", False),
    )


def _rows(config: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """The number of tokens as the config of the trained model must say it."""
    built = model.config.to_dict()
    if "vocab_size" in config:
        return {"vocab_size": built["vocab_size"]}
    text = dict(config.get("text_config") or {})
    if "vocab_size" in text:
        return {"text_config": {**text, "vocab_size": built["text_config"]["vocab_size"]}}
    return {"vocab_size": built["vocab_size"]} if "vocab_size" in built else {}


def _with_dtype(config: Mapping[str, Any], dtype: str | None) -> dict[str, Any]:
    """A config that says the dtype which the weights have, in both spellings that are in use."""
    if dtype is None:
        return dict(config)
    said: dict[str, Any] = {key: dtype for key in ("dtype", "torch_dtype") if key in config}
    said = said or {"dtype": dtype}
    text = config.get("text_config")
    if isinstance(text, Mapping) and {"dtype", "torch_dtype"} & text.keys():
        said["text_config"] = _with_dtype(text, dtype)
    return {**config, **said}


def copy_other_files(source: Source, draft: Path) -> None:
    """Tokenizer, templates, code and generation config: the run's, where it saved them."""
    own_tokenizer = (source.adapter_dir / "tokenizer_config.json").is_file()
    weights = {path.name for path in files_to_load(source.base_dir)}
    for path in source.base_dir.iterdir():
        if not path.is_file() or path.name in weights or path.suffix not in OF_A_MODEL:
            continue
        is_weights = path.suffix in (".safetensors", ".bin") or path.name.endswith(".index.json")
        replaced = path.name in OF_THE_BASE or (own_tokenizer and path.name in TOKENIZER_FILES)
        if is_weights or replaced:
            continue
        shutil.copyfile(path, draft / path.name)
    for name in TOKENIZER_FILES if own_tokenizer else ():
        if (source.adapter_dir / name).is_file():
            shutil.copyfile(source.adapter_dir / name, draft / name)


def raise_limits_of_base(source: Source, draft: Path) -> list[str]:
    """Raise the limits in a folder's files that repeat a context of the base model; what was."""
    from transformers import AutoConfig

    trained = text_config_of(
        AutoConfig.from_pretrained(draft, trust_remote_code=source.remote_code)
    )
    base = text_config_of(source.base_config)
    target = maximum_of(trained)
    if target == maximum_of(base):  # `dynamic`: the maximum is where it begins
        target = source.target_context
    if target is None:
        return []
    old = {*source.base_contexts, maximum_of(base)}
    with suppress(ValueError):  # the config does not say; the recipe did
        old |= set(contexts_of(source.base_config))
    return raise_limits(draft, [context for context in old if context], target)


@contextmanager
def swapped_in(target: Path) -> Iterator[Path]:
    """A folder under another name, which takes the place of `target` once the block has ended."""
    target = target.resolve()  # what a link leads to is replaced, not the link
    draft = target.with_name(f"{target.name}.unfinished")
    earlier = target.with_name(f"{target.name}.earlier")
    if earlier.is_dir():  # killed in the middle of a swap
        if target.is_dir():
            _keep_others(earlier, target)
        else:
            earlier.rename(target)
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        yield draft
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    if target.is_dir():
        target.rename(earlier)
    draft.rename(target)
    if earlier.is_dir():
        _keep_others(earlier, target)


def _keep_others(earlier: Path, target: Path) -> None:
    """Move what is not of the earlier model (results, a GGUF file) to the new one."""
    for path in earlier.iterdir():
        if path.suffix not in OF_A_MODEL and not (target / path.name).exists():
            path.rename(target / path.name)
    shutil.rmtree(earlier)

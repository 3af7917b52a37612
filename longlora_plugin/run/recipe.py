"""A recipe as its YAML file says it, read without importing Axolotl or torch.

The commands read recipes this way; a training run gets its recipe from Axolotl instead.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from longlora_plugin.args import LongLoRAConfig, parse_block

KINDS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(
        (
            *("base_model", "base_model_config", "tokenizer_config", "cls_model_config"),
            *("revision_of_model", "model_revision", "adapter", "attn_implementation"),
            *("output_dir", "lora_model_dir"),
        ),
        (str, Path),
    ),
    "deepspeed": (str, Path, Mapping),
    "fsdp_config": (Mapping,),
    "lora_target_modules": (str, list),
    "plugins": (list,),
}
"""Key → what its value may be, for keys that are read before Axolotl's schema has seen them."""
IN_WORDS: dict[Any, str] = {
    str: "a name",
    Path: "a path",
    Mapping: "a block of keys",
    list: "a list",
}
AXOLOTL_SEQUENCE_LEN = 512
"""Axolotl's default for `sequence_len`."""


@dataclass(frozen=True)
class Recipe:
    """One recipe.

    Attributes:
        path: the YAML file.
        raw: its content, as YAML gives it.
        block: the parsed `longlora:` block; None where the recipe does not ask for LongLoRA.
    """

    path: Path
    raw: dict[str, Any]
    block: LongLoRAConfig | None

    @property
    def base_model(self) -> str:
        return str(self.raw["base_model"])

    @property
    def adapter(self) -> str | None:
        return self.raw.get("adapter")

    @property
    def sequence_len(self) -> int:
        return sequence_len_of(self.raw)

    @property
    def output_dir(self) -> Path:
        return Path(self.raw.get("output_dir") or "./model-out")

    def base_config(self) -> Any:
        """The base model's transformers config (loads torch; reads no weights)."""
        from longlora_plugin.run.base_model import base_config_of

        return base_config_of(self.raw)


def asks_for_longlora(recipe: Mapping[str, Any]) -> bool:
    """Whether a raw recipe wants this plugin to do anything."""
    return recipe.get("adapter") == "longlora" or "longlora" in recipe


def wrong_kinds(recipe: Mapping[str, Any]) -> dict[str, str]:
    """Key → what is wrong with it, for values of a raw recipe of a kind that nobody can read."""
    wrong = {}
    for key, kinds in KINDS.items():
        value = recipe.get(key)
        is_kind = isinstance(value, kinds)
        if isinstance(value, list):
            is_kind = is_kind and all(isinstance(name, str) for name in value)
        if value is not None and not is_kind:
            words = " or ".join(dict.fromkeys(IN_WORDS[kind] for kind in kinds))
            wrong[key] = f"{key}: got {value!r}; write {words}"
    return wrong


def sequence_len_of(recipe: Mapping[str, Any]) -> int:
    """Tokens of a raw recipe's rows.

    Raises:
        ValueError: it gives something else.
    """
    given = recipe.get("sequence_len")
    if given is None:
        return AXOLOTL_SEQUENCE_LEN
    if not is_count(given):
        raise ValueError(
            f"sequence_len: got {given!r}; write a whole number of tokens, such as "
            f"{number_meant(given, 32768)}"
        )
    return int(given)


def is_count(value: Any) -> bool:
    """Whether Axolotl's schema reads a value as a whole number from 1 on: 8, 8.0 or "8"."""
    if isinstance(value, str):
        return value.isascii() and value.strip().isdigit() and int(value) > 0
    if isinstance(value, float):
        return value.is_integer() and value > 0
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def number_meant(value: Any, otherwise: int) -> int:
    """The whole number that was probably meant: 32768 for 32k, 32Ki or "32 k tokens"."""
    text = str(value).lower().replace(",", "").replace("_", "")
    found = re.match(r"\s*(\d+(?:\.\d+)?(?:e\d)?)\s*([km]?)", text)
    if found is None or isinstance(value, bool):
        return otherwise
    return round(float(found[1]) * {"k": 1024, "m": 1024**2, "": 1}[found[2]]) or otherwise


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A recipe's keys and values, unchecked.

    Raises:
        ValueError: the file is missing, not YAML, or not a mapping.
    """
    path = Path(path)
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read recipe {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from None
    try:
        json.dumps(raw, default=str, skipkeys=True)
    except ValueError as error:
        raise ValueError(f"{path}: a block contains itself by an alias ({error})") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path} is not a recipe: expected keys such as base_model, got {raw!r}")
    return raw


def read_recipe(path: str | Path) -> Recipe:
    """Read a recipe.

    Raises:
        ValueError: the file is missing, not YAML, not a mapping, names no `base_model`, or its
            `longlora:` block is wrong.
    """
    path = Path(path)
    raw = read_yaml(path)
    if not raw.get("base_model"):
        raise ValueError(f"{path} names no base_model; add base_model: <name or folder>")
    wrong = wrong_kinds(raw)
    if wrong:
        raise ValueError("\n".join(wrong.values()))
    block = parse_block(raw.get("longlora")) if asks_for_longlora(raw) else None
    return Recipe(path=path, raw=raw, block=block)


def held_out_data(raw: Mapping[str, Any], held_out: str | None = None) -> tuple[list[str], str]:
    """Held-out data that a recipe names: paths, and their text field.

    Args:
        raw: the recipe; its `test_datasets` are taken where `held_out` is not set.
        held_out: `longlora.held_out`.

    Raises:
        ValueError: it names none; says to give the data.
    """
    if held_out:
        return [held_out], "text"
    paths: list[str] = []
    text_field = "text"
    for entry in raw.get("test_datasets") or []:
        files = entry.get("data_files") or entry.get("path")
        paths += [files] if isinstance(files, str) else list(files or [])
        kind = entry.get("type")
        text_field = (
            entry.get("field")
            or (kind.get("field") if isinstance(kind, Mapping) else None)
            or text_field
        )
    if not paths:
        raise ValueError(
            "no data to evaluate on: the recipe has neither longlora.held_out nor test_datasets. "
            "Give --data FILE, a folder or a dataset's name"
        )
    return paths, text_field

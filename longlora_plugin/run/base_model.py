"""The base model's config, read the way Axolotl does but without importing it.

transformers takes six seconds to import, and `plan` needs a dozen numbers. Of common base models
they are read from config.json alone, where it says all of them and no code of the model or override
of the recipe has a part; everything else is transformers' to read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from longlora_plugin.attention.vocabulary import WINDOW_KEYS
from longlora_plugin.checkpoints.files import read_json
from longlora_plugin.run.axolotl_keys import ROPE_KEYS, model_config_of, value_of

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
"""Decoders of one shape: grouped-query attention and a gated FFN in every layer."""
NUMBERS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "max_position_embeddings", "vocab_size"),
)
ROPE_TYPES = ("default", "linear", "yarn", "llama3")
"""Scalings of a base that mean the same to every one of these types."""
DECIDES_MORE = ("quantization_config", "auto_map", "text_config")
"""Fields of config.json with which the numbers are not the whole truth."""

COUNTS = {
    "num_hidden_layers": 10_000,  # more are a typing error, and counting each would take hours
    "num_attention_heads": 100_000,
    "num_key_value_heads": 100_000,
    "hidden_size": 10_000_000,
    "vocab_size": 1_000_000_000,
}
"""Sizes of a config.json that are numbers from 1 on → the largest that any model could have."""
HUB = "https://huggingface.co/"


def base_config_of(recipe: Mapping[str, Any]) -> Any:
    """The base model's transformers config, without the recipe's overrides; reads no weights.

    Raises:
        ValueError: it cannot be read; `__context__` has transformers' own error.
    """
    import transformers

    name = str(recipe.get("base_model_config") or recipe.get("base_model"))
    _check_place(name, recipe)
    options: dict[str, Any] = {"trust_remote_code": recipe.get("trust_remote_code") is True}
    revision = value_of(recipe, "revision_of_model")
    if revision:
        options["revision"] = revision
    kind = getattr(transformers, recipe.get("cls_model_config") or "AutoConfig", None)
    if kind is None:
        raise ValueError(
            f"cls_model_config: transformers has no {recipe['cls_model_config']}; remove it"
        )
    try:
        file = Path(name, "config.json")
        if file.is_file():
            check_sizes(read_json(file))
        return kind.from_pretrained(name, **options)
    except Exception as error:  # whatever a config's class makes of a damaged file
        raise ValueError(
            f"base_model: cannot read the config of {name!r}; write a folder that holds its "
            f"config.json, or a name the Hugging Face hub (or its cache) has: {error}"
        ) from None


def _check_place(name: str, recipe: Mapping[str, Any]) -> None:
    """Refuse what is neither a folder nor a name that the hub could have."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    path = Path(name)
    if name.startswith("~"):
        raise ValueError(
            f"base_model: {name}: Axolotl does not expand ~; write {path.expanduser()}"
        )
    if name.startswith(HUB):
        repository = "/".join(name.removeprefix(HUB).split("/")[:2])
        raise ValueError(f"base_model: {name} is an address; write {repository}")
    if path.is_file() and not recipe.get("base_model_config"):
        raise ValueError(f"base_model: {name} is a file; write its folder, {path.parent}")
    if path.exists():
        return
    try:
        validate_repo_id(name)
        if not name.startswith((".", "/")):
            return
    except HFValidationError:
        pass
    near = get_close_matches(path.name, _folders_in(path.parent), 1)
    hint = f"did you mean {path.parent / near[0]}? Else write" if near else "write"
    raise ValueError(
        f"base_model: the folder {name} does not exist (looked for in {Path.cwd()}); {hint} a "
        "folder that holds the model's config.json, or a name on the Hugging Face hub such as "
        "org/name"
    )


def _folders_in(folder: Path) -> list[str]:
    return [each.name for each in folder.iterdir() if each.is_dir()] if folder.is_dir() else []


def check_sizes(fields: Mapping[str, Any], where: str = "") -> None:
    """Refuse fields of a config.json that give sizes which are none: zero, text, infinity.

    Args:
        where: written before a field's name.

    Raises:
        ValueError: names the field.
    """
    sizes: dict[str, tuple[int, float]] = {name: (1, most) for name, most in COUNTS.items()}
    sizes |= dict.fromkeys(("max_position_embeddings", *WINDOW_KEYS.values()), (0, math.inf))
    for name, (least, most) in sizes.items():
        value = fields.get(name)
        if value is None or isinstance(value, list):  # one for each layer
            continue
        number = isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
        if not number or not least <= value <= most:
            limit = f"from {least}" + ("" if most == math.inf else f" to {most:,}")
            raise ValueError(f"{where}{name}: got {value!r}; it is a number {limit}")
    for name, value in fields.items():
        if str(name).endswith("_config") and isinstance(value, Mapping):
            check_sizes(value)


class PlainConfig(SimpleNamespace):
    """The fields of a config.json, all layers attending to the whole document."""

    def get_text_config(self) -> PlainConfig:
        return self


def plain_config_of(recipe: Mapping[str, Any]) -> PlainConfig | None:
    """The base model's config; None where transformers has to read it."""
    path = Path(str(recipe.get("base_model_config") or recipe.get("base_model")), "config.json")
    if recipe.get("trust_remote_code") or recipe.get("cls_model_config") or not path.is_file():
        return None
    try:
        fields = read_json(path)
        check_sizes(fields)
        own = model_config_of(recipe)
    except ValueError:
        return None
    if own or not _says_everything(fields):
        return None
    return PlainConfig(**{**fields, "sliding_window": None, "layer_types": None})


def _says_everything(fields: Mapping[str, Any]) -> bool:
    model_type = fields.get("model_type")
    numbers = [fields.get(name) for name in NUMBERS]
    if model_type not in MODEL_TYPES or any(map(fields.get, DECIDES_MORE)):
        return False
    if not all(type(number) is int and number > 0 for number in numbers):
        return False
    heads = fields["num_attention_heads"]
    known = "head_dim" in fields if model_type == "qwen3" else not fields["hidden_size"] % heads
    if not known or heads % fields["num_key_value_heads"]:
        return False
    if type(fields.get("head_dim", 1)) is not int:
        return False
    return _attends_fully(fields) and _has_plain_rope(fields)


def _attends_fully(fields: Mapping[str, Any]) -> bool:
    kinds = set(fields.get("layer_types") or ())
    if fields["model_type"] == "mistral":
        limited = fields.get("sliding_window", 4096) is not None
    else:
        limited = bool(fields.get("use_sliding_window"))
    return kinds <= {"full_attention"} and not limited


def _has_plain_rope(fields: Mapping[str, Any]) -> bool:
    rope = fields.get(ROPE_KEYS[0]) or fields.get(ROPE_KEYS[1]) or {}
    if not isinstance(rope, Mapping) or any(isinstance(each, Mapping) for each in rope.values()):
        return False
    kind = rope.get("rope_type") or rope.get("type") or "default"
    return kind in ROPE_TYPES and bool(rope.get("rope_theta") or fields.get("rope_theta"))

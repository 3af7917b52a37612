"""The base model's config, read the way Axolotl does but without importing it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longlora_plugin.run.axolotl_keys import value_of


def base_config_of(recipe: Mapping[str, Any]) -> Any:
    """The base model's transformers config, without the recipe's overrides; reads no weights.

    Raises:
        ValueError: it cannot be read; `__context__` has transformers' own error.
    """
    import transformers

    name = str(recipe.get("base_model_config") or recipe.get("base_model"))
    if name.startswith("~"):
        raise ValueError(
            f"base_model: {name}: Axolotl does not expand ~; write {Path(name).expanduser()}"
        )
    if not Path(name).exists() and (name.startswith((".", "/")) or name.count("/") > 1):
        raise ValueError(
            f"base_model: the folder {name} does not exist (looked for in {Path.cwd()}); write a "
            "folder that holds the model's config.json, or a name on the Hugging Face hub such as "
            "org/name"
        )
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
        return kind.from_pretrained(name, **options)
    except Exception as error:  # whatever a config's class makes of a damaged file
        raise ValueError(
            f"base_model: cannot read the config of {name!r}; write a folder that holds its "
            f"config.json, or a name the Hugging Face hub (or its cache) has: {error}"
        ) from None

"""A recipe of one's own, from a listed one or from what somebody trained; some values changed.

ruamel.yaml edits a listed recipe in place, so the comments that explain each line stay.
"""

from __future__ import annotations

import itertools
import os
import shutil
from io import StringIO
from pathlib import Path
from typing import Any

from longlora_plugin.artifacts.manifest import FILE, find_manifest


def parse_setting(text: str) -> tuple[list[str], Any]:
    """`longlora.rope=yarn` → (["longlora", "rope"], "yarn"); the value is read as YAML.

    Raises:
        ValueError: no `=`, an empty key, or a value that is not YAML.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    key, equals, value = text.partition("=")
    parts = [part.strip() for part in key.split(".")]
    if not equals or not all(parts):
        raise ValueError(f"--set {text}: write key=value, for example --set sequence_len=65536")
    try:
        return parts, YAML().load(value)
    except YAMLError as error:
        raise ValueError(f"--set {text}: {value} is not a YAML value: {error}") from None


def start_from(source: Path, target: Path, settings: list[str]) -> list[Path]:
    """Write a copy of recipe `source` to `target`, with `key=value` settings applied.

    A DeepSpeed file next to the source, and would not be found from here, is copied to
    the target's folder, and the copy named in the recipe.

    Returns:
        The files written, the recipe first.

    Raises:
        ValueError: a setting is wrong, or goes below a key that is no mapping.
    """
    recipe = _yaml().load(source)
    _apply(settings, recipe)
    written = [target]
    named = recipe.get("deepspeed")
    if isinstance(named, str) and not Path(named).is_file():
        with_source = source.parent / "deepspeed" / Path(named).name
        if with_source.is_file():
            copy = target.parent / "deepspeed" / with_source.name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(with_source, copy)
            recipe["deepspeed"] = os.path.relpath(copy)
            written.append(copy)
    _write(recipe, target)
    return written


OF_ONE_RUN = (
    *("output_dir", "dataset_prepared_path", "axolotl_config_path", "hub_model_id"),
    *("lora_model_dir", "resume_from_checkpoint", "auto_resume_from_checkpoints", "wandb_run_id"),
)
"""Keys of a recipe that name one run's own files and places."""


def start_from_run(name: str, target: Path, settings: list[str]) -> list[str]:
    """Write the recipe that somebody's run was trained with to `target`, with settings applied.

    Args:
        name: a folder that training or merging wrote, or a model on the Hugging Face hub.

    Returns:
        Keys of that run alone, which are left out.

    Raises:
        ValueError: there is no such folder or model, it has no `longlora.json`, or a setting is
            wrong.
    """
    from ruamel.yaml.comments import CommentedMap

    manifest = find_manifest(name)
    if not manifest.recipe:
        raise ValueError(
            f"{name}: its {FILE} has no recipe; start from a listed one: longlora recipes list"
        )
    left_out = [key for key in OF_ONE_RUN if key in manifest.recipe]
    recipe = CommentedMap(
        (key, value) for key, value in manifest.recipe.items() if key not in OF_ONE_RUN
    )
    recipe["output_dir"] = _unused(Path("outputs") / target.stem)
    _apply(settings, recipe)
    contexts = " → ".join(
        f"{tokens:,}" for tokens in (manifest.base_context, manifest.target_context) if tokens
    )
    made_with = ", ".join(f"{package} {each}" for package, each in manifest.versions.items())
    recipe.yaml_set_start_comment(
        f"From {name}: {contexts} tokens, RoPE {manifest.rope_preset}, {manifest.steps} steps.\n"
        f"Made with {made_with or 'versions that it does not tell'}.\n"
    )
    _write(recipe, target)
    return left_out


def _unused(folder: Path) -> str:
    """The folder, with a number where there is one of its name."""
    names = (f"{folder}{f'-{number}' if number else ''}" for number in itertools.count())
    return next(name for name in names if not Path(name).exists())


def _yaml() -> Any:
    from ruamel.yaml import YAML

    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 4096
    yaml.indent(mapping=2, sequence=4, offset=2)
    return yaml


def _apply(settings: list[str], recipe: Any) -> None:
    for setting in settings:
        parts, value = parse_setting(setting)
        place = recipe
        for depth, part in enumerate(parts[:-1]):
            if part not in place or place[part] is None:
                place[part] = {}
            place = place[part]
            if not isinstance(place, dict):
                raise ValueError(
                    f"--set {setting}: {'.'.join(parts[: depth + 1])} is {place!r}, not a block of "
                    f"keys; write --set '{'.'.join(parts[: depth + 1])}={{{parts[depth + 1]}: …}}'"
                )
        place[parts[-1]] = value


def _write(recipe: Any, target: Path) -> None:
    text = StringIO()
    _yaml().dump(recipe, text)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text.getvalue(), encoding="utf-8")

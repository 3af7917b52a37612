"""A recipe of one's own from a listed one: its text with comments, some values changed.

ruamel.yaml edits the file in place, so the comments that explain each line stay.
"""

from __future__ import annotations

import os
import shutil
from io import StringIO
from pathlib import Path
from typing import Any


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
    from ruamel.yaml import YAML

    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 4096
    yaml.indent(mapping=2, sequence=4, offset=2)
    recipe = yaml.load(source)
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
    written = [target]
    target.parent.mkdir(parents=True, exist_ok=True)
    named = recipe.get("deepspeed")
    if isinstance(named, str) and not Path(named).is_file():
        with_source = source.parent / "deepspeed" / Path(named).name
        if with_source.is_file():
            copy = target.parent / "deepspeed" / with_source.name
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(with_source, copy)
            recipe["deepspeed"] = os.path.relpath(copy)
            written.append(copy)
    text = StringIO()
    yaml.dump(recipe, text)
    target.write_text(text.getvalue(), encoding="utf-8")
    return written

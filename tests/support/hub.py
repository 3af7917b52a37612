"""A folder of files in the place of the Hugging Face hub: its cache, as downloading leaves it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def put_on_hub(
    folder: Path, name: str, cache: Path, monkeypatch: Any, exclude: list[str] | None = None
) -> None:
    """Make a folder loadable by a hub name, through the hub's own client.

    Args:
        exclude: patterns of `hf upload --exclude`.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import filter_repo_objects

    repository = cache / f"models--{name.replace('/', '--')}"
    files = (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    for file in filter_repo_objects(files, ignore_patterns=exclude):
        target = repository / "snapshots" / COMMIT / file
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / file, target)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))

"""A tiny base model, an adapter, recipes and a text, anew for each file of tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from evaluation_models import text_of, write_adapter, write_recipe, write_tiny_llama


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluation")
    base = write_tiny_llama(folder / "base")
    write_adapter(base, folder / "out")
    write_recipe(folder / "recipe.yml", base, folder / "out")
    write_recipe(folder / "untrained.yml", base, folder / "empty")
    (folder / "data.txt").write_text(text_of(500, seed=3))
    return folder

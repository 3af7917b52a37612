"""Tiny models that tests share: random Llamas with a byte-level tokenizer, made once a session."""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("AXOLOTL_DO_NOT_TRACK", "1")

import pytest
import tiny
import torch
from hypothesis import settings

# In CI the same examples each time: a rare one that fails is found by the runs that draw anew.
settings.register_profile("ci", derandomize=True, deadline=None)
if os.environ.get("CI"):
    settings.load_profile("ci")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Files of real runs first: a long one that begins last leaves the other worker idle.
    items.sort(key=lambda item: item.get_closest_marker("e2e") is None)
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device; torch.cuda.is_available() is False")
        for item in items:
            # Not `item.keywords`, which hold the names of folders too: a checkout named gpu.
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def no_model_stays_enabled():
    """A test that leaves a model with shifted attention fails, and the next ones do not know it."""
    yield
    registries = sys.modules.get("longlora_plugin.attention.registries")
    left = tuple(registries._enabled) if registries else ()
    for handle in left:
        handle.remove()
    assert not left, f"{len(left)} model(s) left enabled: call handle.remove()"


@pytest.fixture(scope="session")
def tiny_text() -> str:
    """A few thousand words with some structure, the same in every run."""
    generator = random.Random(0)
    words = [f"{a}{b}" for a in ("ka", "lo", "mi", "ru", "te") for b in ("n", "sa", "ri", "do")]
    return " ".join(generator.choice(words) for _ in range(6000))


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_text: str):
    return tiny.byte_tokenizer(tiny_text)


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer):
    """Function (name, **config) → folder of a random 2-layer Llama for 64 tokens."""
    root = tmp_path_factory.mktemp("models")

    def make(name: str, **config: object) -> Path:
        folder = root / name
        return folder if folder.exists() else tiny.write_llama(folder, tiny_tokenizer, **config)

    return make


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory: pytest.TempPathFactory, tiny_text: str) -> Path:
    """A completion dataset of 30 documents."""
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    size = len(tiny_text) // 30
    rows = [tiny_text[i * size : (i + 1) * size] for i in range(30)]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return path

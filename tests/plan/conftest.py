"""Llama 2 7B on the meta device, made once."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import LlamaConfig

from longlora_plugin.plan.shape import ModelShape, meta_model, shape_of


@pytest.fixture(scope="session")
def llama_7b() -> Any:
    return meta_model(LlamaConfig())


@pytest.fixture(scope="session")
def shape_7b(llama_7b: Any) -> ModelShape:
    return shape_of(llama_7b)

"""Every test of attention leaves transformers as it found it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import flash_stand_in
import pytest
from attention_material import GROUP, registries

from longlora_plugin.attention import ShiftedAttention, enable_shifted_attention


@pytest.fixture(autouse=True)
def registries_are_restored() -> Iterator[None]:
    before = registries()
    yield
    assert registries() == before


@pytest.fixture
def enable(registries_are_restored: None) -> Iterator[Callable[..., ShiftedAttention]]:
    """`enable_shifted_attention` in groups of 8 tokens; handles are removed after the test."""
    handles: list[ShiftedAttention] = []

    def enable(model: Any, **options: Any) -> ShiftedAttention:
        handles.append(enable_shifted_attention(model, **({"group_size": GROUP} | options)))
        return handles[-1]

    yield enable
    for handle in handles:
        handle.remove()


@pytest.fixture
def flash(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> flash_stand_in.FlashLibrary:
    """The library behind `request.param`, an attn_implementation, stood in for."""
    return flash_stand_in.install(request.param, monkeypatch)

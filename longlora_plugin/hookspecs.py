"""Every hook of LongLoRA. A package adds to it by declaring an entry point in group `longlora`.

Each hook returns a mapping from a name, as recipes will write it, to what that name stands for.
The built-ins (`builtins.py`) come through the same hooks.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from longlora_plugin.attention.layout import AttentionPattern

hookspec = pluggy.HookspecMarker("longlora")
hookimpl = pluggy.HookimplMarker("longlora")


@hookspec
def longlora_rope_presets() -> dict[str, Callable[..., Any]]:  # type: ignore[empty-body]
    """RoPE presets: name → function of a `rope.RopeRequest`, returning `rope_parameters`."""


@hookspec
def longlora_attention_patterns() -> dict[str, AttentionPattern]:  # type: ignore[empty-body]
    """Attention patterns: name → `attention.layout.AttentionPattern`."""


@hookspec
def longlora_trainable_modules() -> dict[str, Callable[..., list[str]]]:  # type: ignore[empty-body]
    """Kinds of trainable modules: kind → function of a built model, returning module names."""


@hookspec
def longlora_recipes() -> dict[str, Path]:  # type: ignore[empty-body]
    """Recipes: name → path of a YAML file."""

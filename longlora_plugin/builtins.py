"""What this package itself provides, through the same hooks that third parties use.

Each import stands inside its hook, so that asking for recipes loads no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from longlora_plugin.hookspecs import hookimpl


@hookimpl
def longlora_rope_presets() -> dict[str, Callable[..., Any]]:
    from longlora_plugin.rope import PRESETS

    return dict(PRESETS)


@hookimpl
def longlora_attention_patterns() -> dict[str, Any]:
    from longlora_plugin.attention.layout import PATTERNS

    return dict(PATTERNS)


@hookimpl
def longlora_trainable_modules() -> dict[str, Callable[..., list[str]]]:
    from longlora_plugin.adapter import MODULE_KINDS

    return dict(MODULE_KINDS)


@hookimpl
def longlora_recipes() -> dict[str, Path]:
    from longlora_plugin.recipes import shipped

    return shipped()

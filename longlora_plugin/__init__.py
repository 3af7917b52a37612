"""LongLoRA for Axolotl: train long contexts with shifted sparse attention (arXiv 2309.12307).

Importing this package loads no torch; each public name is imported when it is first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longlora_plugin.artifacts.load import load_model
    from longlora_plugin.attention import enable_shifted_attention
    from longlora_plugin.plugin import LongLoRAPlugin
    from longlora_plugin.rope import resolve_rope

__all__ = ["LongLoRAPlugin", "enable_shifted_attention", "load_model", "resolve_rope"]
__version__ = "0.1.0"

_MODULES = {
    "LongLoRAPlugin": "longlora_plugin.plugin",
    "enable_shifted_attention": "longlora_plugin.attention",
    "load_model": "longlora_plugin.artifacts.load",
    "resolve_rope": "longlora_plugin.rope",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""LongLoRA for Axolotl: train long contexts with shifted sparse attention (arXiv 2309.12307).

Importing this package loads no torch; `LongLoRAPlugin` is imported when first asked for, which
is what Axolotl does with the recipe's `plugins:` line.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longlora_plugin.plugin import LongLoRAPlugin

__all__ = ["LongLoRAPlugin"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "LongLoRAPlugin":
        from longlora_plugin.plugin import LongLoRAPlugin

        return LongLoRAPlugin
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Shifted sparse attention (S²-Attn): `shifted_sparse_attention` for tensors,
`enable_shifted_attention` for a whole model. Knows nothing of Axolotl.

The layout is index arithmetic and loads no torch; the rest is imported when it is first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from longlora_plugin.attention.layout import S2, AttentionPattern

if TYPE_CHECKING:
    from longlora_plugin.attention.backends import shifted_sparse_attention
    from longlora_plugin.attention.install import ShiftedAttention, enable_shifted_attention

__all__ = [
    "S2",
    "AttentionPattern",
    "ShiftedAttention",
    "enable_shifted_attention",
    "shifted_sparse_attention",
]

_MODULES = {
    "ShiftedAttention": "longlora_plugin.attention.install",
    "enable_shifted_attention": "longlora_plugin.attention.install",
    "shifted_sparse_attention": "longlora_plugin.attention.backends",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Shifted sparse attention (S²-Attn): `shifted_sparse_attention` for tensors,
`enable_shifted_attention` for a whole model. Knows nothing of Axolotl.
"""

from __future__ import annotations

from longlora_plugin.attention.backends import shifted_sparse_attention
from longlora_plugin.attention.install import ShiftedAttention, enable_shifted_attention
from longlora_plugin.attention.layout import S2, AttentionPattern

__all__ = [
    "S2",
    "AttentionPattern",
    "ShiftedAttention",
    "enable_shifted_attention",
    "shifted_sparse_attention",
]

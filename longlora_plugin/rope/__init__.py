"""RoPE scaling: from a preset's name to the `rope_parameters` of a transformers 5 config.

Two contexts of the base model matter. Its *original* context is what it was pretrained on before
any scaling (8192 for Llama 3.1), its *supported* context what it handles now (131072). They are the
same number for an unscaled model. `base_config` reads them from a config, `presets` holds the
presets, `resolve` puts both together, `spelling` writes the result for every reader. Loads no
torch, and transformers only to read a config by its type.
"""

from longlora_plugin.rope.base_config import (
    base_context_of,
    has_rope,
    pretrained_context_of,
    rope_parameters_of,
)
from longlora_plugin.rope.built import check_built_rope
from longlora_plugin.rope.presets import PRESETS, RopeRequest
from longlora_plugin.rope.resolve import RopeSettings, apply_rope, resolve_rope
from longlora_plugin.rope.spelling import keep_both_spellings, rope_fields, write_rope

__all__ = [
    "PRESETS",
    "RopeRequest",
    "RopeSettings",
    "apply_rope",
    "base_context_of",
    "check_built_rope",
    "has_rope",
    "keep_both_spellings",
    "pretrained_context_of",
    "resolve_rope",
    "rope_fields",
    "rope_parameters_of",
    "write_rope",
]

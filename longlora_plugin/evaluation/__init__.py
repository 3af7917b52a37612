"""Measures of a long context: perplexity by length and position, and retrieval of a hidden number.

Everything here uses the model's own full attention (`model.eval()`), as the paper does: LongLoRA,
arXiv 2309.12307, Table 6, shows what evaluating with S²-Attn would cost.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longlora_plugin.evaluation.perplexity import Scores, score_documents, token_losses
    from longlora_plugin.evaluation.windows import Window, sliding_windows

__all__ = ["Scores", "Window", "score_documents", "sliding_windows", "token_losses"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "windows" if name in ("Window", "sliding_windows") else "perplexity"
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)

"""Whether this thread generates text: `GenerationMixin.generate`, wrapped while a model is enabled.

Rollouts of GRPO and the like run in training mode, and generation decides for itself whether it
has a cache, so neither the mode nor the arguments of a forward pass tell it from a training pass.
"""

from __future__ import annotations

import functools
import threading
from typing import Any

from transformers import GenerationMixin


class _Calls(threading.local):
    running = 0


_calls = _Calls()
_wrapped: list[tuple[Any, Any]] = []


def is_running() -> bool:
    """Whether `generate` of any model runs in this thread."""
    return _calls.running > 0


def watch() -> None:
    """Wrap `GenerationMixin.generate`; a second call does nothing."""
    if _wrapped:
        return
    original = GenerationMixin.generate

    @functools.wraps(original)
    def generate(*args: Any, **kwargs: Any) -> Any:
        _calls.running += 1
        try:
            return original(*args, **kwargs)
        finally:
            _calls.running -= 1

    GenerationMixin.generate = generate
    _wrapped.append((original, generate))


def unwatch() -> None:
    """Bring the original method back, unless another package has wrapped it since."""
    while _wrapped:
        original, ours = _wrapped.pop()
        if GenerationMixin.generate is ours:
            GenerationMixin.generate = original

"""DeepSpeed ZeRO-3 and trained norms: stops the crash of DeepSpeed #7203.

PEFT's wrapper around a fully trained module answers `hasattr` for its child. ZeRO-3 marks every
module with backward hooks of its own and asks `hasattr` whether a module is marked; once the child
is marked, its wrapper looks marked too and is given the child's hooks, and the first backward pass
ends with "'LlamaRMSNorm' object has no attribute 'ds_grads_remaining'". Norms meet this, embeddings
do not, because only a module whose input needs a gradient is hooked.
"""

from __future__ import annotations

import functools
from typing import Any

from peft.utils.other import AuxiliaryTrainingWrapper

DEEPSPEED_MARKS = frozenset(
    {"pre_bwd_fn", "post_bwd_fn", "ds_grads_remaining", "applied_pre_backward_ref_cnt"}
)
"""What DeepSpeed sets on modules and then asks for (runtime/zero/parameter_offload.py)."""


class ZeRO3HookGuard:
    """While installed, PEFT's wrappers answer for DeepSpeed's marks themselves.

    Everything else about them stays as it is. Installing twice is the same as once.
    """

    def __init__(self) -> None:
        self._original: Any = None

    def install(self) -> ZeRO3HookGuard:
        original = AuxiliaryTrainingWrapper.__getattr__
        if self._original is not None or hasattr(original, "__wrapped__"):
            return self

        @functools.wraps(original)
        def __getattr__(wrapper: Any, name: str) -> Any:  # noqa: N807  (it becomes a method)
            if name in DEEPSPEED_MARKS:
                raise AttributeError(f"{type(wrapper).__name__!r} object has no attribute {name!r}")
            return original(wrapper, name)

        self._original = original
        AuxiliaryTrainingWrapper.__getattr__ = __getattr__
        return self

    def remove(self) -> None:
        """PEFT's own behaviour is back."""
        if self._original is not None:
            AuxiliaryTrainingWrapper.__getattr__ = self._original
            self._original = None

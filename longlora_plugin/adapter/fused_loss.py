"""Cut Cross Entropy and a tied output head that trains as an fp32 copy.

The kernel takes the head's weight instead of calling the head, and multiplies it with the hidden
states as they are, outside autocast: an fp32 weight and bf16 states do not compile in Triton. Here
the weight is cast to the states' dtype first, as the head itself does; its gradient comes back in
fp32. (Liger's fused loss multiplies under autocast, and sums the fp32 weight's gradient in fp32.)
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch

ENTRY_MODULE = "cut_cross_entropy.transformers.utils"
"""Where every patched model of Axolotl's fork looks the kernel up, at each call."""


def cast_heads_for_cut_cross_entropy() -> Callable[[], None]:
    """Have Cut Cross Entropy take fp32 heads with 16-bit states, where it was loaded.

    Returns:
        Function that puts the package's own back.
    """
    entry = sys.modules.get(ENTRY_MODULE)
    original = getattr(entry, "linear_cross_entropy", None)
    if entry is None or original is None:
        return lambda: None

    @functools.wraps(original)
    def linear_cross_entropy(e: torch.Tensor, c: torch.Tensor, *args: Any, **options: Any) -> Any:
        half = e.dtype in (torch.bfloat16, torch.float16)
        return original(e, c.to(e.dtype) if half else c, *args, **options)

    vars(entry)["linear_cross_entropy"] = linear_cross_entropy
    return lambda: vars(entry).update(linear_cross_entropy=original)

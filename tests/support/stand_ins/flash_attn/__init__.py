"""FlashAttention 2 by its definition, for a CPU: what transformers and ring-flash-attn call of it.

Not a kernel: scores of a row are in memory as a whole. `flash_shim.py` puts it on the path.
"""

from flash_attn.flash_attn_interface import flash_attn_func, flash_attn_varlen_func

__version__ = "2.8.3"
__all__ = ["flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"]


def flash_attn_with_kvcache(*_, **__):
    raise NotImplementedError("the stand-in trains; it does not generate")

"""Test-only Axolotl plugin: `flash_attention_2` on a CPU, by the stand-in in `stand_ins/`.

The real ring-flash-attn runs on it, and with that Axolotl 0.19's context parallelism.
"""

import sys
from pathlib import Path
from types import ModuleType

import torch
from axolotl.integrations.base import BasePlugin

STAND_INS = Path(__file__).parent / "stand_ins"


class Wider(ModuleType):
    """torch, with fp32 for the bf16 of FlashAttention, and fp64 for what adds it up."""

    bfloat16, float32 = torch.float32, torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


def install():
    if torch.cuda.is_available() or str(STAND_INS) in sys.path:
        return
    sys.path.insert(0, str(STAND_INS))
    import transformers.modeling_flash_attention_utils as flash
    from transformers import PreTrainedModel

    PreTrainedModel._flash_attn_can_dispatch = lambda *_, **__: True
    for module in list(sys.modules.values()):
        if "is_flash_attn_2_available" in vars(module):
            module.is_flash_attn_2_available = lambda: True
    flash.FLASH_ATTENTION_COMPATIBILITY_MATRIX[2]["general_availability_check"] = lambda: True
    # Of ring-flash-attn: compiled blocks, and the device to put boundaries on.
    torch.compile = lambda function=None, **_: function or (lambda given: given)
    torch.cuda.current_device = lambda: "cpu"


class FlashShim(BasePlugin):
    def register(self, cfg):
        install()

    def pre_model_load(self, cfg):
        # Rows here are fp32, and ring-flash-attn would add gradients up in place of their parts.
        for name, module in sys.modules.items():
            if name.startswith("ring_flash_attn.ring"):
                module.torch = Wider("torch")

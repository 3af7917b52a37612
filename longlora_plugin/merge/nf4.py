"""What training with a 4-bit base did to its weights, for a merge into the 16-bit ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def rounding_of(settings: Mapping[str, Any]) -> Callable[[Any], Any]:
    """Function tensor → the values that its 4-bit copy has, in its dtype.

    Args:
        settings: keywords of BitsAndBytesConfig; what is missing is as Axolotl trains (NF4, double
            quantization).
    """

    def rounding(tensor: Any) -> Any:
        import bitsandbytes.functional as bnb

        kind = settings.get("bnb_4bit_quant_type", "nf4")
        values, state = bnb.quantize_4bit(
            tensor.reshape(-1).float().contiguous(),
            quant_type=kind,
            compress_statistics=settings.get("bnb_4bit_use_double_quant", True),
            **({"blocksize": settings["blocksize"]} if settings.get("blocksize") else {}),
        )
        rounded = bnb.dequantize_4bit(values, state, quant_type=kind)
        return rounded.view_as(tensor).to(tensor.dtype)

    return rounding


def quantized_names(
    model: Any, skipped: list[str] | None, *, linear: bool, experts: bool
) -> frozenset[str]:
    """Names of the weights that are quantized when a 4-bit model is loaded.

    Args:
        model: the model on the meta device, without an adapter.
        skipped: `llm_int8_skip_modules`, where set.
        linear: the linear layers, but the output head.
        experts: Axolotl's `quantize_moe_experts`: fused experts as well.
    """
    import torch
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    left_out = get_keys_to_not_convert(model) if skipped is None else skipped
    names = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if linear
        and isinstance(module, torch.nn.Linear | Conv1D)
        and should_convert_module(name, left_out)
    }
    if experts:
        names |= {
            name
            for name, parameter in model.named_parameters()
            if parameter.ndim == 3 and "expert" in name
        }
    return frozenset(names)

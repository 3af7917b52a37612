"""Back ends by name: the ones that are refused, and, on a GPU, the real libraries."""

from __future__ import annotations

import dense_attention
import pytest
import torch
from attention_material import (
    assert_gradients_near,
    assert_near,
    in_float64,
    one_document_and_several,
    tiny_llama,
)
from flash_stand_in import FLASH, HUB_KERNEL
from transformers import modeling_flash_attention_utils

from longlora_plugin.attention import enable_shifted_attention, shifted_sparse_attention


@pytest.mark.parametrize(
    "implementation",
    ["sage_attention", "xformers", "fp8", "paged|flash_attention_2", "paged|" + HUB_KERNEL, "s2"],
)
def test_an_unsupported_attn_implementation_is_refused_by_name_with_the_supported_ones(
    implementation: str,
) -> None:
    model = tiny_llama()
    model.config._attn_implementation = implementation
    with pytest.raises(ValueError, match="does not support attn_implementation") as refusal:
        enable_shifted_attention(model, group_size=16)
    message = str(refusal.value)
    assert implementation in message
    for supported in ("sdpa", "eager", *FLASH[:3], "flex_attention", "flash-attn2"):
        assert supported in message
    assert "shifted_attention: false" in message


def why_not_here(implementation: str) -> str | None:
    if not torch.cuda.is_available():
        return "needs a CUDA device"
    version = implementation.removeprefix("flash_attention_")
    if version != implementation:
        check = getattr(modeling_flash_attention_utils, f"is_flash_attn_{version}_available")
        if not check():
            return f"FlashAttention {version} is not installed"
    return None


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["sdpa", "flex_attention", *FLASH[:3]])
def test_on_a_gpu_each_library_equals_the_definition(implementation: str) -> None:
    reason = why_not_here(implementation)
    if reason:
        pytest.skip(f"{implementation}: {reason}")
    for cuts in one_document_and_several(1000):
        qkv = [
            torch.randn(1, 1000, h, 64).to("cuda", torch.bfloat16).transpose(1, 2).requires_grad_()
            for h in (8, 4, 4)
        ]
        boundaries = torch.tensor(cuts or (0, 1000), dtype=torch.int32)
        out = shifted_sparse_attention(
            *qkv, group_size=256, cu_seqlens=boundaries.cuda(), backend=implementation
        )
        ids = (torch.arange(1000)[:, None] >= boundaries).sum(1)
        mask = dense_attention.masks(ids, 256, 8, 4)
        doubles = in_float64(qkv)
        expected = dense_attention.attention(*doubles, mask)
        assert_near(out.cpu(), expected, 2e-2)
        assert_gradients_near((out, qkv), (expected, doubles), 3e-2)

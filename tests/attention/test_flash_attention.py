"""S²-Attn on FlashAttention 2, 3, 4 and kernels of the hub, stood in for (`flash_stand_in`)."""

from __future__ import annotations

import dense_attention
import pytest
import torch
from attention_material import (
    assert_gradients_near,
    assert_near,
    attend,
    batches,
    in_float64,
    logits_and_gradients,
    one_document_and_several,
    random_qkv,
    tiny_llama,
)
from flash_stand_in import FlashLibrary, each_flash_library
from transformers import LlamaForCausalLM

from longlora_plugin.attention import enable_shifted_attention, shifted_sparse_attention


@each_flash_library
@pytest.mark.parametrize("v_head_dim", [8, 4, 12])
@pytest.mark.parametrize("heads", [(4, 2), (3, 1), (3, 3), (1, 1)])
@pytest.mark.parametrize("length", [3, 4, 8, 9, 37, 100])
def test_flash_kernels_get_what_they_demand_and_equal_the_definition(
    length: int, heads: tuple[int, int], v_head_dim: int, flash: FlashLibrary
) -> None:
    n_heads, kv_heads = heads
    for cuts in one_document_and_several(length):
        flash.calls.clear()
        qkv = random_qkv(length, *heads, v_head_dim=v_head_dim)
        out = shifted_sparse_attention(
            *qkv,
            group_size=8,
            scale=0.4,
            cu_seqlens=None if cuts is None else torch.tensor(cuts, dtype=torch.int32),
            full_attention_below=9,
            backend=flash.implementation,
        )
        ids = torch.arange(length)
        ids = (ids[:, None] >= torch.tensor(cuts or (0, length))).sum(1)
        mask = dense_attention.masks(ids, 8, *heads, 9)
        doubles = in_float64(qkv)
        expected = dense_attention.attention(*doubles, mask, scale=0.4)
        assert_near(out, expected, 1e-2)
        assert_gradients_near((out, qkv), (expected, doubles), 2e-2)
        # One call for each half of the heads, and keys as they are: never repeated.
        assert len(flash.calls) == min(2, n_heads)
        assert sum(call.query[1] for call in flash.calls) == n_heads
        taken = sum(call.key[1] for call in flash.calls)
        assert taken == (kv_heads if kv_heads > 1 else len(flash.calls))


@each_flash_library
def test_softcap_reaches_the_flash_kernel(flash: FlashLibrary) -> None:
    qkv = random_qkv(30)
    out = attend(flash.implementation, qkv, 8, softcap=0.5)
    mask = dense_attention.masks(torch.zeros(30), 8, 4, 2)
    assert_near(out, dense_attention.attention(*qkv, mask, softcap=0.5), 1e-2)
    assert (out - dense_attention.attention(*qkv, mask)).abs().max() > 0.1


@each_flash_library
def test_sinks_reach_a_kernel_that_has_them_and_are_refused_by_others(flash: FlashLibrary) -> None:
    qkv, sinks = random_qkv(30), torch.randn(4)
    if flash.implementation != "flash_attention_4":
        with pytest.raises(ValueError, match="has no attention sinks, which this model needs"):
            attend(flash.implementation, qkv, 8, sinks_H=sinks)
        return
    out = attend(flash.implementation, qkv, 8, sinks_H=sinks)
    mask = dense_attention.masks(torch.zeros(30), 8, 4, 2)
    assert_near(out, dense_attention.attention(*qkv, mask, sinks=sinks), 1e-2)


@each_flash_library
def test_dropout_is_refused_by_kernels_that_have_none(flash: FlashLibrary) -> None:
    refusal: tuple[type[Exception], str] = (AssertionError, "dropout_p == 0")  # of the kernel
    if flash.implementation in ("flash_attention_3", "flash_attention_4"):
        refusal = (ValueError, r"has no attention dropout, but the model asks for 0.1")
    with pytest.raises(refusal[0], match=refusal[1]):
        attend(flash.implementation, random_qkv(30), 8, dropout=0.1)


# --- whole models ------------------------------------------------------------------------------


def on_flash(model: LlamaForCausalLM, implementation: str) -> LlamaForCausalLM:
    """transformers refuses to select FlashAttention without a GPU, so write the choice itself."""
    model.config._attn_implementation = implementation
    return model


@each_flash_library
@pytest.mark.parametrize("kind", list(batches()))
def test_a_model_on_flash_attention_trains_like_on_sdpa_with_two_calls_a_layer(
    kind: str, flash: FlashLibrary
) -> None:
    batch = batches()[kind]
    model = tiny_llama(dtype=torch.bfloat16)
    handle = enable_shifted_attention(model, group_size=16)
    logits, gradients = logits_and_gradients(model, batch)
    handle.remove()

    on_flash(model, flash.implementation)
    handle = enable_shifted_attention(model, group_size=16)
    flash_logits, flash_gradients = logits_and_gradients(model, batch)
    assert len(flash.calls) == 2 * handle.layers
    assert all(call.cu_seqlens is not None for call in flash.calls)
    real_tokens = int(batch.get("attention_mask", torch.ones_like(batch["input_ids"])).sum())
    assert {call.query[0] for call in flash.calls} == {real_tokens}
    assert {call.key[1] for call in flash.calls} == {1}
    assert_near(flash_logits, logits, 2e-2)
    for one, other in zip(flash_gradients, gradients, strict=True):
        assert_near(one, other, 3e-2)
    handle.remove()
    flash.calls.clear()
    with torch.no_grad():
        model(input_ids=batch["input_ids"], use_cache=False)
    assert [call.cu_seqlens for call in flash.calls] == [None] * handle.layers


@pytest.mark.parametrize("flash", ["flash_attention_2"], indirect=True)
def test_evaluation_keeps_the_stock_flash_path(flash: FlashLibrary) -> None:
    model = on_flash(tiny_llama(dtype=torch.bfloat16), "flash_attention_2").eval()
    handle = enable_shifted_attention(model, group_size=16)
    with torch.no_grad():
        model(**batches()["unpadded"], use_cache=False)
    assert [call.cu_seqlens for call in flash.calls] == [None] * handle.layers
    assert handle.calls == 0
    handle.remove()


@pytest.mark.parametrize("flash", ["flash_attention_2"], indirect=True)
def test_4274_real_tokens_of_8192_run_where_the_original_crashed(flash: FlashLibrary) -> None:
    """Its cu_seqlens fell for this length (facts, part 2); the stand-in demands that they rise."""
    model = on_flash(
        tiny_llama(1, torch.bfloat16, hidden_size=8, num_attention_heads=2, intermediate_size=8),
        "flash_attention_2",
    )
    handle = enable_shifted_attention(model, group_size=2048)
    mask = torch.zeros(1, 8192, dtype=torch.long)
    mask[:, :4274] = 1
    model(input_ids=torch.ones_like(mask), attention_mask=mask, use_cache=False)
    plain, shifted = (call.cu_seqlens for call in flash.calls)
    assert plain == [0, 2048, 4096, 4274]
    assert shifted == [0, 1024, 3072, 4274]
    handle.remove()


@pytest.mark.parametrize("flash", ["flash_attention_2"], indirect=True)
def test_fp32_hidden_states_are_cast_for_the_kernel_as_in_the_stock_path(
    flash: FlashLibrary,
) -> None:
    """fp32 masters of norms or embeddings make queries fp32; the kernel takes only halves."""
    model = on_flash(tiny_llama(dtype=torch.float32), "flash_attention_2")
    handle = enable_shifted_attention(model, group_size=16)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(**batches()["unpadded"], use_cache=False).logits
    assert len(flash.calls) == 2 * handle.layers
    assert logits.isfinite().all()
    handle.remove()

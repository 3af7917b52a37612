"""S²-Attn on kernels that cannot run here: FlashAttention 2, 3, 4, hub kernels, FlexAttention.

Each library is stood in for by functions with its exact signature that compute the definition, in
float64, from what they are given (`cu_seqlens`, the block mask), and check what the real kernels
demand. What transformers does in between is the real thing. Tests marked `gpu` use the libraries.

Signatures: flash-attn 2.8 (`flash_attn/flash_attn_interface.py`), FlashAttention 3
(`hopper/flash_attn_interface.py`), FlashAttention 4 (`flash_attn/cute/interface.py`).
"""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import dense_attention
import pytest
import torch
from click.testing import CliRunner
from torch.nn.attention.flex_attention import BlockMask
from transformers import LlamaConfig, LlamaForCausalLM, modeling_flash_attention_utils
from transformers.integrations import flex_attention as hf_flex
from transformers.integrations import hub_kernels
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from benchmarks.attention.__main__ import main
from benchmarks.attention.methods import roll_and_matmul
from longlora_plugin.attention import (
    S2,
    backends,
    enable_shifted_attention,
    flex,
    packing,
    sdpa,
    shifted_sparse_attention,
    varlen,
)
from longlora_plugin.attention.backends import backend_for
from longlora_plugin.attention.call import AttentionCall
from longlora_plugin.attention.layout import HeadRun, head_runs, segments

HUB_KERNEL = "kernels-community/flash-attn2"
FLASH = ["flash_attention_2", "flash_attention_3", "flash_attention_4", HUB_KERNEL]


# --- FlashAttention's stand-in -----------------------------------------------------------------


@dataclass
class Call:
    query: torch.Size
    key: torch.Size
    cu_seqlens: list[int] | None


class FlashLibrary:
    """Records calls and computes them by the definition."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def varlen(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        *,
        scale: float | None,
        causal: bool,
        softcap: float | None,
        sink: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """q [T, H, D], k and v [T, K, D] → [T, H, D]."""
        assert q.dtype == k.dtype == v.dtype
        assert q.dtype in (torch.float16, torch.bfloat16), f"the kernel takes no {q.dtype}"
        assert q.shape[-1] == v.shape[-1] == k.shape[-1]
        assert q.shape[1] % k.shape[1] == 0
        assert k.shape == v.shape
        assert all(x.stride(-1) == 1 for x in (q, k, v))
        assert causal
        for cu in (cu_seqlens_q, cu_seqlens_k):
            assert cu.dtype == torch.int32
            assert cu.dim() == 1
            assert cu.is_contiguous()
        cuts = cu_seqlens_q.tolist()
        assert cuts == cu_seqlens_k.tolist()
        assert cuts[0] == 0
        assert cuts[-1] == q.shape[0]
        sizes = [last - first for first, last in pairwise(cuts)]
        assert min(sizes) > 0, "boundaries must rise"
        assert isinstance(max_seqlen_q, int)
        assert max_seqlen_q == max_seqlen_k == max(sizes)
        self.calls.append(Call(q.shape, k.shape, cuts))
        outputs = []
        for q_S, k_S, v_S in zip(q.split(sizes), k.split(sizes), v.split(sizes), strict=True):
            mask = torch.ones(1, len(q_S), len(q_S), dtype=torch.bool).tril()
            out = dense_attention.attention(
                *[x.transpose(0, 1)[None] for x in (q_S, k_S, v_S)],
                mask,
                scale=scale,
                softcap=softcap or None,
                sinks=sink,
            )
            outputs.append(out[0].transpose(0, 1))
        return torch.cat(outputs).to(q.dtype)

    def whole_rows(self, q: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """What the stock path calls without padding; S² never does."""
        self.calls.append(Call(q.shape, q.shape, None))
        return q

    def functions_2(self) -> dict[str, Callable[..., Any]]:
        def flash_attn_func(
            q,
            k,
            v,
            dropout_p=0.0,
            softmax_scale=None,
            causal=False,
            window_size=(-1, -1),
            softcap=0.0,
            alibi_slopes=None,
            deterministic=False,
            return_attn_probs=False,
        ):
            return self.whole_rows(q, k, v)

        def flash_attn_varlen_func(
            q,
            k,
            v,
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
            dropout_p=0.0,
            softmax_scale=None,
            causal=False,
            window_size=(-1, -1),
            softcap=0.0,
            alibi_slopes=None,
            deterministic=False,
            return_attn_probs=False,
            block_table=None,
        ):
            assert window_size == (-1, -1)
            assert dropout_p == 0, "dropout_p == 0"
            cu = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
            return self.varlen(q, k, v, *cu, scale=softmax_scale, causal=causal, softcap=softcap)

        return {
            "flash_attn_func": flash_attn_func,
            "flash_attn_varlen_func": flash_attn_varlen_func,
            "flash_attn_with_kvcache": lambda *args, **kwargs: None,
        }

    def functions_3(self) -> dict[str, Callable[..., Any]]:
        def flash_attn_func(
            q,
            k,
            v,
            softmax_scale=None,
            causal=False,
            qv=None,
            q_descale=None,
            k_descale=None,
            v_descale=None,
            window_size=(-1, -1),
            attention_chunk=0,
            softcap=0.0,
            num_splits=1,
            pack_gqa=None,
            deterministic=False,
            sm_margin=0,
            return_attn_probs=False,
        ):
            return self.whole_rows(q, k, v)

        def flash_attn_varlen_func(
            q,
            k,
            v,
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
            seqused_q=None,
            seqused_k=None,
            softmax_scale=None,
            causal=False,
            qv=None,
            q_descale=None,
            k_descale=None,
            v_descale=None,
            window_size=(-1, -1),
            attention_chunk=0,
            softcap=0.0,
            num_splits=1,
            pack_gqa=None,
            deterministic=False,
            sm_margin=0,
            return_attn_probs=False,
        ):
            assert window_size == (-1, -1)
            assert seqused_q is seqused_k is qv is None
            cu = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
            return self.varlen(q, k, v, *cu, scale=softmax_scale, causal=causal, softcap=softcap)

        return {
            "flash_attn_func": flash_attn_func,
            "flash_attn_varlen_func": flash_attn_varlen_func,
            "flash_attn_with_kvcache": lambda *args, **kwargs: None,
        }

    def functions_4(self) -> dict[str, Callable[..., Any]]:
        def flash_attn_func(
            q,
            k,
            v,
            softmax_scale=None,
            causal=False,
            window_size=(None, None),
            learnable_sink=None,
            softcap=0.0,
            num_splits=1,
            pack_gqa=None,
            deterministic=False,
            mask_mod=None,
            full_block_cnt=None,
            full_block_idx=None,
            mask_block_cnt=None,
            mask_block_idx=None,
            block_size=None,
            return_lse=False,
        ):
            return self.whole_rows(q, k, v), None

        def flash_attn_varlen_func(
            q,
            k,
            v,
            cu_seqlens_q=None,
            cu_seqlens_k=None,
            max_seqlen_q=None,
            max_seqlen_k=None,
            seqused_q=None,
            seqused_k=None,
            page_table=None,
            softmax_scale=None,
            causal=False,
            window_size=(None, None),
            learnable_sink=None,
            softcap=0.0,
            num_splits=1,
            pack_gqa=None,
            deterministic=False,
            score_mod=None,
            aux_tensors=None,
            return_lse=False,
        ):
            assert window_size == (None, None)
            if learnable_sink is not None:
                assert learnable_sink.dtype == torch.bfloat16
                assert learnable_sink.shape == (q.shape[1],)
            out = self.varlen(
                q,
                k,
                v,
                cu_seqlens_q,
                cu_seqlens_k,
                max_seqlen_q,
                max_seqlen_k,
                scale=softmax_scale,
                causal=causal,
                softcap=softcap,
                sink=learnable_sink,
            )
            return out, None

        return {
            "flash_attn_func": flash_attn_func,
            "flash_attn_varlen_func": flash_attn_varlen_func,
        }


def module(name: str, functions: dict[str, Callable[..., Any]]) -> types.ModuleType:
    made = types.ModuleType(name)
    vars(made).update(functions)
    return made


@pytest.fixture
def flash(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> FlashLibrary:
    """Stand in for the library behind `request.param`, an attn_implementation."""
    hf = modeling_flash_attention_utils
    for name in (
        "_loaded_implementation",
        "_flash_fn",
        "_flash_varlen_fn",
        "_flash_with_kvcache_fn",
    ):
        monkeypatch.setattr(hf, name, None)
    monkeypatch.setattr(hf, "_process_flash_kwargs_fn", None)
    library = FlashLibrary()
    implementation = request.param
    for version in (2, 3, 4):
        available = implementation == f"flash_attention_{version}"
        monkeypatch.setattr(hf, f"is_flash_attn_{version}_available", lambda ok=available: ok)
    if implementation == "flash_attention_2":
        padding = {"pad_input": hf._pad_input, "unpad_input": hf._unpad_input}
        package = module("flash_attn", library.functions_2())
        monkeypatch.setitem(sys.modules, "flash_attn", package)
        monkeypatch.setitem(
            sys.modules, "flash_attn.bert_padding", module("flash_attn.bert_padding", padding)
        )
    elif implementation == "flash_attention_3":
        interface = module("flash_attn_interface", library.functions_3())
        monkeypatch.setitem(sys.modules, "flash_attn_interface", interface)
    elif implementation == "flash_attention_4":
        monkeypatch.setitem(sys.modules, "flash_attn", module("flash_attn", {}))
        cute = module("flash_attn.cute", library.functions_4())
        monkeypatch.setitem(sys.modules, "flash_attn.cute", cute)
    else:
        kernel = module("kernel", library.functions_2())
        monkeypatch.setattr(hub_kernels, "get_kernel", lambda *args, **kwargs: kernel)
        monkeypatch.setattr(hub_kernels, "is_kernels_available", lambda: True)
        hub_kernels.load_and_register_attn_kernel(implementation)
    yield library
    ALL_ATTENTION_FUNCTIONS._global_mapping.pop(HUB_KERNEL, None)
    ALL_MASK_ATTENTION_FUNCTIONS._global_mapping.pop(HUB_KERNEL, None)


def inputs(
    length: int,
    heads: int = 4,
    kv_heads: int = 2,
    *,
    batch: int = 1,
    v_head_dim: int = 8,
    dtype: torch.dtype = torch.bfloat16,
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(length)
    return [
        torch.randn(batch, length, h, d, generator=generator)
        .to(dtype)
        .transpose(1, 2)
        .requires_grad_()
        for h, d in ((heads, 8), (kv_heads, 8), (kv_heads, v_head_dim))
    ]


def assert_near(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape
    error = (actual.double() - expected.double()).abs().max().item()
    assert error <= tolerance * max(1.0, expected.abs().max().item()), error


def both_ways(length: int) -> list[tuple[int, ...] | None]:
    return [None, tuple(sorted({0, length // 3, length // 3 + 1, length}))]


@pytest.mark.parametrize(
    ("flash", "implementation"), [(name, name) for name in FLASH], indirect=["flash"]
)
@pytest.mark.parametrize("v_head_dim", [8, 4, 12])
@pytest.mark.parametrize("heads", [(4, 2), (3, 1), (3, 3), (1, 1)])
@pytest.mark.parametrize("length", [3, 4, 8, 9, 37, 100])
def test_flash_kernels_get_what_they_demand_and_equal_the_definition(
    length: int, heads: tuple[int, int], v_head_dim: int, implementation: str, flash: FlashLibrary
) -> None:
    n_heads, kv_heads = heads
    for cuts in both_ways(length):
        flash.calls.clear()
        qkv = inputs(length, *heads, v_head_dim=v_head_dim)
        out = shifted_sparse_attention(
            *qkv,
            group_size=8,
            scale=0.4,
            cu_seqlens=None if cuts is None else torch.tensor(cuts, dtype=torch.int32),
            full_attention_below=9,
            backend=implementation,
        )
        ids = torch.arange(length)
        ids = (ids[:, None] >= torch.tensor(cuts or (0, length))).sum(1)
        mask = dense_attention.masks(ids, 8, *heads, 9)
        doubles = [x.detach().double().requires_grad_() for x in qkv]
        expected = dense_attention.attention(*doubles, mask, scale=0.4)
        assert_near(out, expected, 1e-2)
        towards = torch.randn(out.shape)
        for gradient, wanted in zip(
            torch.autograd.grad(out, qkv, towards.to(out.dtype)),
            torch.autograd.grad(expected, doubles, towards.to(out.dtype).double()),
            strict=True,
        ):
            assert_near(gradient, wanted, 2e-2)
        # One call for each half of the heads, and keys as they are: never repeated.
        assert len(flash.calls) == min(2, n_heads)
        assert sum(call.query[1] for call in flash.calls) == n_heads
        taken = sum(call.key[1] for call in flash.calls)
        assert taken == (kv_heads if kv_heads > 1 else len(flash.calls))


@pytest.mark.parametrize(
    ("flash", "implementation"), [(name, name) for name in FLASH], indirect=["flash"]
)
def test_softcap_reaches_the_flash_kernel(implementation: str, flash: FlashLibrary) -> None:
    qkv = inputs(30)
    out = backend_for(implementation)(
        *qkv,
        AttentionCall(
            documents=packing.whole_rows(1, 30),
            runs=head_runs(S2, 4, 2, 8),
            group_size=8,
            full_attention_below=0,
            softcap=0.5,
        ),
    ).transpose(1, 2)
    mask = dense_attention.masks(torch.zeros(30), 8, 4, 2)
    assert_near(out, dense_attention.attention(*qkv, mask, softcap=0.5), 1e-2)
    assert (out - dense_attention.attention(*qkv, mask)).abs().max() > 0.1


@pytest.mark.parametrize(
    ("flash", "implementation"), [(name, name) for name in FLASH], indirect=["flash"]
)
def test_sinks_reach_a_kernel_that_has_them_and_are_refused_by_others(
    implementation: str, flash: FlashLibrary
) -> None:
    qkv, sinks = inputs(30), torch.randn(4)

    def attend() -> torch.Tensor:
        return backend_for(implementation)(
            *qkv,
            AttentionCall(
                documents=packing.whole_rows(1, 30),
                runs=head_runs(S2, 4, 2, 8),
                group_size=8,
                full_attention_below=0,
                sinks_H=sinks,
            ),
        ).transpose(1, 2)

    if implementation != "flash_attention_4":
        with pytest.raises(ValueError, match="has no attention sinks, which this model needs"):
            attend()
        return
    mask = dense_attention.masks(torch.zeros(30), 8, 4, 2)
    assert_near(attend(), dense_attention.attention(*qkv, mask, sinks=sinks), 1e-2)


@pytest.mark.parametrize(
    ("flash", "implementation"), [(name, name) for name in FLASH], indirect=["flash"]
)
def test_dropout_is_refused_by_kernels_that_have_none(
    implementation: str, flash: FlashLibrary
) -> None:
    call = AttentionCall(packing.whole_rows(1, 30), head_runs(S2, 4, 2, 8), 8, dropout=0.1)
    if implementation in ("flash_attention_3", "flash_attention_4"):
        with pytest.raises(
            ValueError, match=r"has no attention dropout, but the model asks for 0.1"
        ):
            backend_for(implementation)(*inputs(30), call)
    else:
        with pytest.raises(AssertionError, match="dropout_p == 0"):  # it reaches the kernel
            backend_for(implementation)(*inputs(30), call)


# --- whole models on FlashAttention ------------------------------------------------------------


def tiny_llama(layers: int = 2, **config: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    settings = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 16384,
        "attn_implementation": "sdpa",
    }
    return LlamaForCausalLM(LlamaConfig(**(settings | config))).train()


def on_flash(model: LlamaForCausalLM, implementation: str) -> LlamaForCausalLM:
    """transformers refuses to select FlashAttention without a GPU, so write the choice itself."""
    model.config._attn_implementation = implementation
    return model


def batches() -> dict[str, dict[str, torch.Tensor]]:
    ids = torch.randint(97, (2, 60), generator=torch.Generator().manual_seed(3))
    right = torch.ones_like(ids)
    right[1, 41:] = 0
    positions = torch.cat([torch.arange(25), torch.arange(1), torch.arange(34)])[None]
    row = {"input_ids": ids[:1], "position_ids": positions}
    cu = torch.tensor([0, 25, 26, 60], dtype=torch.int32)
    return {
        "unpadded": {"input_ids": ids},
        "padded right": {"input_ids": ids, "attention_mask": right},
        "padded left": {"input_ids": ids, "attention_mask": right.flip(1)},
        "packed by positions": row,
        # What Axolotl's and transformers' flattening collators pass besides.
        "packed by cu_seq_lens": row
        | {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": 34, "max_length_k": 34},
    }


def logits_and_gradients(
    model: LlamaForCausalLM, batch: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    model.zero_grad()
    logits = model(**batch, use_cache=False).logits.float()
    real = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    logits = logits * real[..., None]
    (logits.square().sum() / real.sum()).backward()
    return logits.detach(), [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize(
    ("flash", "implementation"), [(name, name) for name in FLASH], indirect=["flash"]
)
@pytest.mark.parametrize("kind", list(batches()))
def test_a_model_on_flash_attention_trains_like_on_sdpa_with_two_calls_a_layer(
    kind: str, implementation: str, flash: FlashLibrary
) -> None:
    batch = batches()[kind]
    model = tiny_llama().to(torch.bfloat16)
    handle = enable_shifted_attention(model, group_size=16)
    logits, gradients = logits_and_gradients(model, batch)
    handle.remove()

    on_flash(model, implementation)
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
    model = on_flash(tiny_llama().to(torch.bfloat16), "flash_attention_2").eval()
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
        tiny_llama(1, hidden_size=8, num_attention_heads=2, intermediate_size=8),
        "flash_attention_2",
    ).to(torch.bfloat16)
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
    model = on_flash(tiny_llama(), "flash_attention_2")
    handle = enable_shifted_attention(model, group_size=16)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(**batches()["unpadded"], use_cache=False).logits
    assert len(flash.calls) == 2 * handle.layers
    assert logits.isfinite().all()
    handle.remove()


# --- FlexAttention -----------------------------------------------------------------------------


def block_masks_of(
    lengths: list[int], heads: int, kv_heads: int, group_size: int, below: int = 0
) -> list[tuple[HeadRun, BlockMask]]:
    runs = head_runs(S2, heads, kv_heads, group_size)
    total = sum(lengths)
    documents = packing.from_boundaries(torch.tensor([0, *lengths]).cumsum(0), total)
    cuts = tuple(segments(documents.intervals, group_size, run.shift, below) for run in runs)
    masks = flex._block_masks(cuts, total, torch.device("cpu"))
    return list(zip(runs, masks, strict=True))


def listed(counts: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """[1, H, M] and [1, H, M, M] of a BlockMask → bool [H, M, M]: is the block in the list?"""
    columns = counts.shape[-1]
    chosen = torch.zeros(counts.shape[1], columns, columns, dtype=torch.bool)
    for head in range(counts.shape[1]):
        for row in range(columns):
            chosen[head, row, indices[0, head, row, : counts[0, head, row]].long()] = True
    return chosen


FLEX_LAYOUTS = [
    ([1], 2),
    ([127], 64),
    ([128], 64),
    ([129], 256),
    ([640], 512),
    ([650], 512),
    ([513], 384),
    ([700], 2000),
    ([130, 1, 300, 256, 90], 300),
    ([256, 256], 256),
    ([384, 127, 129], 512),
]


@pytest.mark.parametrize("heads", [(4, 2), (3, 1), (1, 1)])
@pytest.mark.parametrize(("lengths", "group_size"), FLEX_LAYOUTS)
def test_block_mask_lists_exactly_the_blocks_that_hold_an_allowed_pair(
    lengths: list[int], group_size: int, heads: tuple[int, int]
) -> None:
    below = 127
    total = sum(lengths)
    ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    mask = dense_attention.masks(ids, group_size, *heads, below)
    blocks = -(-total // flex.BLOCK)
    padded = torch.zeros(heads[0], blocks * flex.BLOCK, blocks * flex.BLOCK, dtype=torch.bool)
    padded[:, :total, :total] = mask
    tiles = padded.view(heads[0], blocks, flex.BLOCK, blocks, flex.BLOCK).transpose(2, 3)
    some, all_ = tiles.flatten(3).any(-1), tiles.flatten(3).all(-1)
    i = torch.arange(total)
    for run, block_mask in block_masks_of(lengths, *heads, group_size, below):
        partial = listed(block_mask.kv_num_blocks, block_mask.kv_indices)
        full = listed(block_mask.full_kv_num_blocks, block_mask.full_kv_indices)
        assert torch.equal(block_mask.to_dense()[0].bool(), some[run.query][:1])
        assert torch.equal((partial | full).expand_as(some[run.query]), some[run.query])
        assert torch.equal(full.expand_as(all_[run.query]), all_[run.query]), (
            "a full block is computed without asking mask_mod"
        )
        assert not (partial & full).any()
        zero = torch.tensor(0)
        asked = block_mask.mask_mod(zero, zero, i[:, None], i[None, :])
        assert torch.equal(asked.expand_as(mask[run.query]), mask[run.query])


def flex_stand_in(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    training: bool = False,
    **kwargs: Any,
) -> torch.Tensor:
    """`compile_friendly_flex_attention` by definition: only listed blocks, full ones unmasked."""
    block_mask = kwargs["block_mask"]
    length = query.shape[2]
    partial = listed(block_mask.kv_num_blocks, block_mask.kv_indices)
    full = listed(block_mask.full_kv_num_blocks, block_mask.full_kv_indices)
    i = torch.arange(length)
    head = torch.arange(query.shape[1])[:, None, None]
    asked = block_mask.mask_mod(torch.tensor(0), head, i[:, None], i[None, :])
    block = i // flex.BLOCK
    here = (slice(None), block[:, None], block[None, :])
    mask = full[here] | (partial[here] & asked)
    assert kwargs["enable_gqa"] or query.shape[1] == key.shape[1]
    assert kwargs.get("return_aux") is None
    out = dense_attention.attention(query, key, value, mask, scale=kwargs["scale"])
    return out.to(query.dtype)


def torch_flex(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    training: bool = False,
    **kwargs: Any,
) -> torch.Tensor:
    """PyTorch's own FlexAttention, uncompiled: forward only on a CPU."""
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention(query, key, value, **kwargs)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("heads", [(4, 2), (3, 1), (3, 3), (1, 1), (6, 3)])
@pytest.mark.parametrize(("lengths", "group_size"), FLEX_LAYOUTS[2:])
def test_torchs_flex_attention_equals_the_definition_forward(
    lengths: list[int], group_size: int, heads: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf_flex, "compile_friendly_flex_attention", torch_flex)
    total = sum(lengths)
    ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    with torch.no_grad():
        qkv = inputs(total, *heads, dtype=torch.float32)
        out = shifted_sparse_attention(
            *qkv,
            group_size=group_size,
            cu_seqlens=torch.tensor([0, *lengths]).cumsum(0),
            full_attention_below=127,
            backend="flex_attention",
        )
    mask = dense_attention.masks(ids, group_size, *heads, 127)
    assert_near(out, dense_attention.attention(*qkv, mask), 1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_softcap_reaches_flex_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_flex, "compile_friendly_flex_attention", torch_flex)
    with torch.no_grad():
        qkv = inputs(200, dtype=torch.float32)
        out = backend_for("flex_attention")(
            *qkv,
            AttentionCall(
                documents=packing.whole_rows(1, 200),
                runs=head_runs(S2, 4, 2, 90),
                group_size=90,
                full_attention_below=0,
                softcap=0.5,
            ),
        ).transpose(1, 2)
    mask = dense_attention.masks(torch.zeros(200), 90, 4, 2)
    assert_near(out, dense_attention.attention(*qkv, mask, softcap=0.5), 1e-5)


@pytest.mark.parametrize("heads", [(4, 2), (3, 1), (6, 3)])
@pytest.mark.parametrize(("lengths", "group_size"), FLEX_LAYOUTS[3:])
def test_gradients_through_the_block_mask_equal_the_definition(
    lengths: list[int], group_size: int, heads: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf_flex, "compile_friendly_flex_attention", flex_stand_in)
    total = sum(lengths)
    ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    qkv = inputs(total, *heads, dtype=torch.float64)
    out = shifted_sparse_attention(
        *qkv,
        group_size=group_size,
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0),
        backend="flex_attention",
    )
    expected = dense_attention.attention(*qkv, dense_attention.masks(ids, group_size, *heads))
    towards = torch.randn_like(out)
    assert_near(out, expected, 1e-12)
    for gradient, wanted in zip(
        torch.autograd.grad(out, qkv, towards),
        torch.autograd.grad(expected, qkv, towards),
        strict=True,
    ):
        assert_near(gradient, wanted, 1e-12)


@pytest.mark.parametrize("kind", list(batches()))
def test_a_model_on_flex_attention_trains_like_on_sdpa_with_one_block_mask_for_all_layers(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf_flex, "compile_friendly_flex_attention", flex_stand_in)
    batch = batches()[kind]
    model = tiny_llama(3)
    handle = enable_shifted_attention(model, group_size=16)
    logits, gradients = logits_and_gradients(model, batch)
    handle.remove()
    model.set_attn_implementation("flex_attention")
    handle = enable_shifted_attention(model, group_size=16)
    flex._block_masks.cache_clear()
    flex_logits, flex_gradients = logits_and_gradients(model, batch)
    logits_and_gradients(model, batch)
    handle.remove()
    assert flex._block_masks.cache_info().misses == 1
    assert flex._block_masks.cache_info().hits == 5
    assert_near(flex_logits, logits, 1e-5)
    for one, other in zip(flex_gradients, gradients, strict=True):
        assert_near(one, other, 1e-5)


@pytest.mark.parametrize("tokens", [1000, 4096])
def test_block_masks_take_16_bytes_a_pair_of_blocks_for_each_run_of_heads(tokens: int) -> None:
    masks = block_masks_of([tokens], 32, 32, 512)
    blocks = -(-tokens // flex.BLOCK)
    assert len(masks) == 2, "one for each half of the heads, not for each head"
    for _, mask in masks:
        held = [x for x in vars(mask).values() if isinstance(x, torch.Tensor)]
        # Lists of partial and of full blocks, by rows and by columns, int32.
        assert sum(x.nbytes for x in held) == 16 * blocks**2 + 16 * blocks
    assert flex._block_masks.cache_info().maxsize <= 2


# --- the varlen kernel of PyTorch ----------------------------------------------------------------


def torch_stand_in(library: FlashLibrary, takes: frozenset[str]) -> Callable[..., torch.Tensor]:
    def varlen_attn(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, **options: Any
    ) -> torch.Tensor:
        assert options.keys() <= takes
        assert options.get("window_size") == (-1, 0) or options.get("is_causal") is True
        assert query.shape[1] == key.shape[1] or options["enable_gqa"]
        cu = (cu_seq_q, cu_seq_k, max_q, max_k)
        return library.varlen(
            query, key, value, *cu, scale=options.get("scale"), causal=True, softcap=None
        )

    return varlen_attn


TORCH_2_10, TORCH_2_13 = {"is_causal"}, {"window_size", "scale", "enable_gqa"}


@pytest.mark.parametrize("takes", [TORCH_2_10, TORCH_2_13], ids=["torch 2.10", "torch 2.13"])
@pytest.mark.parametrize("heads", [(4, 2), (3, 1), (3, 3), (1, 1)])
@pytest.mark.parametrize("v_head_dim", [8, 4])
@pytest.mark.parametrize("padded", [False, True])
def test_packed_and_padded_rows_are_one_call_of_torchs_varlen_kernel_a_run_of_heads(
    padded: bool,
    v_head_dim: int,
    heads: tuple[int, int],
    takes: set[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch_varlen = pytest.importorskip("torch.nn.attention.varlen", reason="needs torch 2.10")
    library = FlashLibrary()
    monkeypatch.setattr(torch_varlen, "varlen_attn", torch_stand_in(library, frozenset(takes)))
    monkeypatch.setattr(varlen, "_parameters_of_torch_varlen", lambda: frozenset(takes))
    monkeypatch.setattr(backends, "torch_varlen_serves", lambda *_: True)
    ids = torch.tensor([[0] * 20 + [1] + [2] * 16, [3] * 9 + [-1] * 28 if padded else [4] * 37])
    qkv = inputs(37, *heads, batch=2, v_head_dim=v_head_dim)
    scale = None if takes == TORCH_2_10 else 0.3
    call = AttentionCall(
        documents=packing.from_ids(ids, None, batch=2, length=37),
        runs=head_runs(S2, *heads, 8),
        group_size=8,
        scale=scale,
    )
    # Without an argument for it, the scale is that of the heads as the kernel gets them.
    out = backend_for("sdpa")(*qkv, call).transpose(1, 2)
    assert len(library.calls) == len(call.runs)
    mask = torch.stack([dense_attention.masks(row, 8, *heads) for row in ids])
    doubles = [x.detach().double().requires_grad_() for x in qkv]
    real = (ids >= 0)[:, None, :, None]
    expected = dense_attention.attention(*doubles, mask, scale=scale)
    assert_near(out * real, expected, 1e-2)
    assert not (out * ~real).any()
    towards = torch.randn(out.shape).to(out.dtype) * real
    for gradient, wanted in zip(
        torch.autograd.grad(out, qkv, towards),
        torch.autograd.grad(expected, doubles, towards.double()),
        strict=True,
    ):
        assert_near(gradient, wanted, 2e-2)


CPU, GPU = torch.device("cpu"), torch.device("cuda")


@dataclass
class OnGPU:
    """What the choice of a kernel asks of a tensor."""

    dtype: torch.dtype = torch.bfloat16
    shape: tuple[int, ...] = (1, 4, 100, 64)
    device: torch.device = GPU


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (9, 0)])
@pytest.mark.parametrize(
    ("tensor", "options", "served"),
    [
        (OnGPU(), {}, True),
        (OnGPU(torch.float16), {"softcap": 3.0}, True),  # sdpa knows no softcap either
        (OnGPU(torch.float32), {}, False),
        (OnGPU(shape=(1, 4, 100, 288)), {}, False),
        (OnGPU(shape=(1, 4, 100, 20)), {}, False),
        (OnGPU(), {"dropout": 0.1}, False),
        (OnGPU(), {"sinks_H": torch.zeros(4)}, False),
        (OnGPU(device=CPU), {}, False),
    ],
)
def test_torchs_varlen_kernel_serves_16_bits_since_ampere_without_options(
    tensor: OnGPU,
    options: dict[str, Any],
    served: bool,
    capability: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("torch.nn.attention.varlen", reason="needs torch 2.10")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    call = AttentionCall(packing.whole_rows(1, 100), (), 8, **options)
    wanted = served and capability >= (8, 0)
    assert varlen.torch_varlen_serves(tensor, tensor, call) is wanted


# --- grouped heads where no fused kernel takes them ----------------------------------------------


@pytest.mark.parametrize("capability", [(7, 5), (8, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_heads_have_a_fused_kernel_in_16_bits_since_ampere_only(
    dtype: torch.dtype, capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    fused = sdpa.has_fused_grouped_heads(OnGPU(dtype))
    assert fused == (dtype == torch.bfloat16 and capability >= (8, 0))
    assert not sdpa.has_fused_grouped_heads(OnGPU(shape=(1, 4, 100, 512)))


@pytest.mark.parametrize("heads", [(4, 2), (3, 1), (6, 2)])
@pytest.mark.parametrize("cuts", [None, (0, 13, 37)])
def test_repeated_keys_and_values_equal_grouped_heads_in_values_and_gradients(
    cuts: tuple[int, ...] | None, heads: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    fused, grouped = torch.nn.functional.scaled_dot_product_attention, []

    def record(*args: Any, enable_gqa: bool, **kwargs: Any) -> torch.Tensor:
        grouped.append(enable_gqa)
        return fused(*args, enable_gqa=enable_gqa, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", record)
    qkv = inputs(37, *heads, dtype=torch.float64)
    options = {"group_size": 8, "cu_seqlens": None if cuts is None else torch.tensor(cuts)}
    wanted = shifted_sparse_attention(*qkv, **options)
    assert any(grouped)
    grouped.clear()
    monkeypatch.setattr(sdpa, "has_fused_grouped_heads", lambda _: False)
    out = shifted_sparse_attention(*qkv, **options)
    assert not any(grouped)
    towards = torch.randn_like(out)
    assert_near(out, wanted, 1e-12)
    for gradient, expected in zip(
        torch.autograd.grad(out, qkv, towards),
        torch.autograd.grad(wanted, qkv, towards),
        strict=True,
    ):
        assert_near(gradient, expected, 1e-12)


# --- refusals ----------------------------------------------------------------------------------


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


# --- the real libraries ------------------------------------------------------------------------


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
    for cuts in both_ways(1000):
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
        doubles = [x.detach().cpu().double().requires_grad_() for x in qkv]
        expected = dense_attention.attention(*doubles, mask)
        assert_near(out.cpu(), expected, 2e-2)
        towards = torch.randn(out.shape).bfloat16()
        for gradient, wanted in zip(
            torch.autograd.grad(out, qkv, towards.cuda()),
            torch.autograd.grad(expected, doubles, towards.double()),
            strict=True,
        ):
            assert_near(gradient.cpu(), wanted, 3e-2)


# --- the benchmark -----------------------------------------------------------------------------


@pytest.mark.parametrize("flash", ["flash_attention_2"], indirect=True)
def test_the_benchmark_times_every_back_end_and_writes_table_json_and_picture(
    flash: FlashLibrary, tmp_path: Path
) -> None:
    outputs = {kind: tmp_path / f"out.{kind}" for kind in ("json", "png", "md")}
    result = CliRunner().invoke(
        main,
        [
            *["--lengths", "64,128", "--group-size", "32", "--rounds", "1", "--head-dim", "16"],
            *["--dtype", "bfloat16", "--device", "cpu"],
            *["--backend", "sdpa", "--backend", "flash_attention_2"],
            *["--json", str(outputs["json"]), "--plot", str(outputs["png"])],
            *["--markdown", str(outputs["md"])],
        ],
        catch_exceptions=False,
    )
    assert result.exit_code == 0
    assert flash.calls
    measured = json.loads(outputs["json"].read_text())
    assert "torch" in measured["machine"]
    cases = {
        (row["attention"], row["groups"], row["length"], row["method"]) for row in measured["rows"]
    }
    methods = ("full", "floor", "roll", "s2 sdpa", "s2 flash_attention_2")
    assert cases == {
        (heads, groups, length, method)
        for heads in ("MHA", "GQA")
        for groups in ("N·0.25", "32")
        for length in (64, 128)
        for method in methods
    }
    assert all(row["seconds"] > 0 and row["peak_bytes"] > 0 for row in measured["rows"])
    assert outputs["png"].stat().st_size > 1000
    assert outputs["md"].read_text().count("\n") == 2 + 2 * 2 * 2 * 2


def test_the_benchmarks_rolling_leaks_the_future_and_agrees_elsewhere() -> None:
    """The published algorithm and ours differ in the shifted heads' end half-groups only."""
    qkv = inputs(64, dtype=torch.float64)
    rolled = roll_and_matmul(*qkv, 16)
    ours = shifted_sparse_attention(*qkv, group_size=16)
    assert_near(rolled[:, :2], ours[:, :2], 1e-6)  # its softmax is in fp32
    assert_near(rolled[:, 2:, 8:], ours[:, 2:, 8:], 1e-6)
    assert (rolled[:, 2:, :8] - ours[:, 2:, :8]).abs().max() > 0.1

"""FlashAttention 2, 3, 4 and hub kernels, which cannot run here, stood in for.

Each library is a set of functions with its exact signature that compute the definition, in
float64, from the `cu_seqlens` they are given, and check what the real kernels demand. What
transformers does in between is the real thing.

Signatures: flash-attn 2.8 (`flash_attn/flash_attn_interface.py`), FlashAttention 3
(`hopper/flash_attn_interface.py`), FlashAttention 4 (`flash_attn/cute/interface.py`).
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import dense_attention
import pytest
import torch
from transformers import modeling_flash_attention_utils as hf
from transformers.integrations import hub_kernels
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

HUB_KERNEL = "kernels-community/flash-attn2"
FLASH = ["flash_attention_2", "flash_attention_3", "flash_attention_4", HUB_KERNEL]
Functions = dict[str, Callable[..., Any]]

each_flash_library = pytest.mark.parametrize("flash", FLASH, indirect=True)


@dataclass
class Call:
    query: torch.Size
    key: torch.Size
    cu_seqlens: list[int] | None


class FlashLibrary:
    """Records calls and computes them by the definition."""

    def __init__(self, implementation: str = "") -> None:
        self.implementation = implementation
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


def _with_cache(*functions: Callable[..., Any]) -> Functions:
    """The two functions by their names, and the one for generation, which no test calls."""
    named = {function.__name__: function for function in functions}
    return {**named, "flash_attn_with_kvcache": lambda *args, **kwargs: None}


def flash_attention_2(library: FlashLibrary) -> Functions:
    def flash_attn_func(
        q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1),
        softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
    ):  # fmt: skip
        return library.whole_rows(q, k, v)

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
        softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
        deterministic=False, return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        assert window_size == (-1, -1)
        assert dropout_p == 0, "dropout_p == 0"
        cu = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        return library.varlen(q, k, v, *cu, scale=softmax_scale, causal=causal, softcap=softcap)

    return _with_cache(flash_attn_func, flash_attn_varlen_func)


def flash_attention_3(library: FlashLibrary) -> Functions:
    def flash_attn_func(
        q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None,
        v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1,
        pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False,
    ):  # fmt: skip
        return library.whole_rows(q, k, v)

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None,
        seqused_k=None, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None,
        v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1,
        pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False,
    ):  # fmt: skip
        assert window_size == (-1, -1)
        assert seqused_q is seqused_k is qv is None
        cu = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        return library.varlen(q, k, v, *cu, scale=softmax_scale, causal=causal, softcap=softcap)

    return _with_cache(flash_attn_func, flash_attn_varlen_func)


def flash_attention_4(library: FlashLibrary) -> Functions:
    def flash_attn_func(
        q, k, v, softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None,
        softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, mask_mod=None,
        full_block_cnt=None, full_block_idx=None, mask_block_cnt=None, mask_block_idx=None,
        block_size=None, return_lse=False,
    ):  # fmt: skip
        return library.whole_rows(q, k, v), None

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
        seqused_q=None, seqused_k=None, page_table=None, softmax_scale=None, causal=False,
        window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None,
        deterministic=False, score_mod=None, aux_tensors=None, return_lse=False,
    ):  # fmt: skip
        assert window_size == (None, None)
        if learnable_sink is not None:
            assert learnable_sink.dtype == torch.bfloat16
            assert learnable_sink.shape == (q.shape[1],)
        cu = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        options = {"scale": softmax_scale, "softcap": softcap, "sink": learnable_sink}
        return library.varlen(q, k, v, *cu, causal=causal, **options), None

    return {
        "flash_attn_func": flash_attn_func,
        "flash_attn_varlen_func": flash_attn_varlen_func,
    }


def module(name: str, functions: Functions) -> types.ModuleType:
    made = types.ModuleType(name)
    vars(made).update(functions)
    return made


def install(implementation: str, monkeypatch: pytest.MonkeyPatch) -> FlashLibrary:
    """Stand in for the library behind an attn_implementation, until the test ends."""
    for name in ("loaded_implementation", "flash_fn", "flash_varlen_fn", "flash_with_kvcache_fn"):
        monkeypatch.setattr(hf, f"_{name}", None)
    monkeypatch.setattr(hf, "_process_flash_kwargs_fn", None)
    for version in (2, 3, 4):
        available = implementation == f"flash_attention_{version}"
        monkeypatch.setattr(hf, f"is_flash_attn_{version}_available", lambda ok=available: ok)
    library = FlashLibrary(implementation)
    modules: dict[str, Functions] = {}
    if implementation == "flash_attention_2":
        padding = {"pad_input": hf._pad_input, "unpad_input": hf._unpad_input}
        modules = {"flash_attn": flash_attention_2(library), "flash_attn.bert_padding": padding}
    elif implementation == "flash_attention_3":
        modules = {"flash_attn_interface": flash_attention_3(library)}
    elif implementation == "flash_attention_4":
        modules = {"flash_attn": {}, "flash_attn.cute": flash_attention_4(library)}
    else:
        kernel = module("kernel", flash_attention_2(library))
        monkeypatch.setattr(hub_kernels, "get_kernel", lambda *args, **kwargs: kernel)
        monkeypatch.setattr(hub_kernels, "is_kernels_available", lambda: True)
        for registry in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
            # So that the kernel, which is registered next, is gone after the test.
            monkeypatch.setitem(registry._global_mapping, implementation, None)
        hub_kernels.load_and_register_attn_kernel(implementation)
    for name, functions in modules.items():
        monkeypatch.setitem(sys.modules, name, module(name, functions))
    return library

"""S²-Attn on variable-length kernels: one call a run of heads (two for S²).

Segments are what `cu_seqlens` was made for. FlashAttention 2, 3, 4 and hub kernels are found by
transformers' own dispatcher, so all work as they do in the original model; `torch_varlen` is the
FlashAttention 2 inside PyTorch, which needs no other package.

Shape suffixes as in `sdpa.py`; T real tokens of the whole batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache, partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch

from longlora_plugin.attention.call import AttentionCall
from longlora_plugin.attention.layout import Segments
from longlora_plugin.attention.packing import index_on, whole_rows
from longlora_plugin.attention.rows import flatten, of_one_size, unflatten
from longlora_plugin.attention.sdpa import by_run

VarlenKernel = Callable[..., torch.Tensor]
"""Causal attention of segments that follow each other: (q_ThD, k_TkD, v_TkD, cuts, call) → out_ThD,
one head size for all. Where a segment has fewer queries than keys, they are the last ones."""


class Cuts(NamedTuple):
    """Boundaries of segments, int32 [S + 1], and the longest one, of queries and of keys."""

    queries: torch.Tensor
    keys: torch.Tensor
    longest_queries: int
    longest_keys: int


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # what is kept may be needed in training
def _cuts(cut: Segments, pieces: tuple[tuple[int, int], ...], device: torch.device) -> Cuts:
    """Boundaries of segments of keys; the first of each piece lacks the queries of its halo."""
    starts = accumulate((sum(piece) for piece in pieces), initial=0)
    halos = dict(zip(starts, (halo for halo, _ in pieces), strict=False))
    keys = [length for _, length in cut]
    queries = [length - halos.get(start, 0) for start, length in cut]
    cu_keys, cu_queries = (
        index_on(torch.tensor([0, *accumulate(each)], dtype=torch.int32), device)
        for each in (keys, queries)
    )
    return Cuts(cu_queries if pieces else cu_keys, cu_keys, max(queries), max(keys))


def varlen_attention(
    q_BHND: torch.Tensor,
    k_BKND: torch.Tensor,
    v_BKND: torch.Tensor,
    call: AttentionCall,
    *,
    kernel: VarlenKernel,
) -> torch.Tensor:
    """Attention inside segments with a variable-length kernel (fp16 or bf16).

    Returns:
        [B, N, H, D]; padding is zero.
    """
    head_dim, v_head_dim = q_BHND.shape[-1], v_BKND.shape[-1]
    q_BHND, k_BKND, v_BKND = of_one_size(q_BHND, k_BKND, v_BKND)
    scaled = call.with_scale(head_dim)
    pieces, of_queries = call.pieces, call.documents
    if pieces:
        pieces *= of_queries.batch
        of_queries = whole_rows(of_queries.batch, q_BHND.shape[2])
    outputs = []
    # Heads are split where tokens are the outer dimension: no copy of query, key or value.
    qkv_BNhD = (x.transpose(1, 2) for x in (q_BHND, k_BKND, v_BKND))
    for run, *qkv_run in by_run(call.runs, *qkv_BNhD, dim=2):
        cuts = _cuts(call.segments(run), pieces, q_BHND.device)
        rows = (flatten(x, call.documents) for x in qkv_run)
        out = kernel(*rows, cuts, scaled.of_run(run))
        outputs.append(out[..., :v_head_dim])
    joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
    return unflatten(joined, of_queries)


def flash_attention(
    q_BHND: torch.Tensor,
    k_BKND: torch.Tensor,
    v_BKND: torch.Tensor,
    call: AttentionCall,
    *,
    implementation: str,
) -> torch.Tensor:
    """S²-Attn with the FlashAttention that transformers calls `implementation`.

    Raises:
        ValueError: the kernel has no sinks or no dropout, and the call has.
    """
    if call.sinks_H is not None or call.dropout:
        _check_options(implementation, call)
    kernel = partial(_flash_kernel, implementation)
    return varlen_attention(q_BHND, k_BKND, v_BKND, call, kernel=kernel)


def _check_options(implementation: str, call: AttentionCall) -> None:
    """Refuse what transformers would leave out without a word."""
    from transformers.modeling_flash_attention_utils import lazy_import_flash_attention

    functions, *_ = lazy_import_flash_attention(implementation)
    takes = inspect.signature(functions[1]).parameters
    if call.sinks_H is not None and not {"s_aux", "learnable_sink"} & takes.keys():
        raise ValueError(
            f"the kernel of attn_implementation: {implementation} has no attention sinks, "
            "which this model needs; write flash_attention_4, flex_attention or eager"
        )
    if call.dropout and not {"dropout_p", "dropout"} & takes.keys():
        raise ValueError(
            f"the kernel of attn_implementation: {implementation} has no attention dropout, but "
            f"the model asks for {call.dropout}; write attn_implementation: flash_attention_2 or "
            "sdpa, or overrides_of_model_config: {attention_dropout: 0.0}"
        )


def _flash_kernel(
    implementation: str,
    q_ThD: torch.Tensor,
    k_TkD: torch.Tensor,
    v_TkD: torch.Tensor,
    cuts: Cuts,
    call: AttentionCall,
) -> torch.Tensor:
    # Not from modeling_flash_attention_utils: there Axolotl puts ring attention in its place.
    from transformers.integrations import flash_attention as integration

    sinks = {} if call.sinks_H is None else {"s_aux": call.sinks_H.to(q_ThD.dtype)}
    return integration._flash_attention_forward(
        q_ThD[None],
        k_TkD[None],
        v_TkD[None],
        attention_mask=None,
        query_length=q_ThD.shape[0],
        is_causal=True,
        dropout=call.dropout,
        softmax_scale=call.scale,
        softcap=call.softcap,
        cu_seq_lens_q=cuts.queries,
        cu_seq_lens_k=cuts.keys,
        max_length_q=cuts.longest_queries,
        max_length_k=cuts.longest_keys,
        attn_implementation=implementation,
        **sinks,
    )[0]


def torch_varlen_serves(q: torch.Tensor, v: torch.Tensor, call: AttentionCall) -> bool:
    """Whether `torch_varlen` computes this call: PyTorch ≥ 2.10, a GPU since Ampere, 16 bits, heads
    of up to 256 that are a multiple of 8, no dropout, no sinks, the default scale or an argument
    for it.
    """
    if q.device.type != "cuda" or q.dtype not in (torch.float16, torch.bfloat16):
        return False
    head_dim, takes = max(q.shape[-1], v.shape[-1]), _parameters_of_torch_varlen()
    return (
        bool(takes)
        and head_dim <= 256
        and head_dim % 8 == 0
        and not call.dropout
        and call.sinks_H is None
        and ("scale" in takes or call.scale is None or call.scale == head_dim**-0.5)
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
    )


@lru_cache(maxsize=1)
def _parameters_of_torch_varlen() -> frozenset[str]:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    return frozenset(inspect.signature(varlen_attn).parameters)


def torch_varlen(
    q_ThD: torch.Tensor,
    k_TkD: torch.Tensor,
    v_TkD: torch.Tensor,
    cuts: Cuts,
    call: AttentionCall,
) -> torch.Tensor:
    """The kernel of `torch.nn.attention.varlen`, whose arguments differ between versions."""
    from torch.nn.attention import varlen

    takes = _parameters_of_torch_varlen()
    options: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in takes else {}
    if "is_causal" in takes:
        options["is_causal"] = True
    if "scale" in takes:
        options["scale"] = call.scale
    repeats = q_ThD.shape[1] // k_TkD.shape[1]
    if repeats > 1 and "enable_gqa" in takes:
        options["enable_gqa"] = True
    elif repeats > 1:
        k_TkD, v_TkD = (x.repeat_interleave(repeats, dim=1) for x in (k_TkD, v_TkD))
    return varlen.varlen_attn(q_ThD, k_TkD, v_TkD, *cuts, **options)

"""S²-Attn on FlashAttention's variable-length kernels: one call a run of heads (two for S²).

Segments are what `cu_seqlens` was made for. The kernel is found by transformers' own dispatcher,
so FlashAttention 2, 3, 4 and hub kernels all work as they do in the original model.

Shape suffixes as in `sdpa.py`; T real tokens of the whole batch.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch.nn import functional

from longlora_plugin.attention.call import AttentionCall
from longlora_plugin.attention.layout import Segments
from longlora_plugin.attention.sdpa import flatten, unflatten


@lru_cache(maxsize=16)
def _cu_seqlens(cut: Segments, device: torch.device) -> tuple[torch.Tensor, int]:
    cuts = [start for start, _ in cut] + [sum(cut[-1])]
    longest = max(length for _, length in cut)
    return torch.tensor(cuts, dtype=torch.int32, device=device), longest


def varlen_attention(
    q_BHND: torch.Tensor,
    k_BKND: torch.Tensor,
    v_BKND: torch.Tensor,
    call: AttentionCall,
    *,
    implementation: str,
) -> torch.Tensor:
    """Attention inside segments with a FlashAttention kernel (fp16 or bf16).

    Args:
        implementation: transformers' name of the kernel, for example `flash_attention_2`.

    Returns:
        [B, N, H, D]; padding is zero.
    """
    from transformers.modeling_flash_attention_utils import (
        _flash_attention_forward,
        lazy_import_flash_attention,
    )

    if call.sinks_H is not None:
        _, process = lazy_import_flash_attention(implementation)
        takes = process.keywords["supports_mapping"]
        if not (takes["s_aux"] or takes["learnable_sink"]):
            raise ValueError(
                f"the kernel of attn_implementation: {implementation} has no attention sinks, "
                "which this model needs; write flash_attention_4, flex_attention or eager"
            )
    head_dim, v_head_dim = q_BHND.shape[-1], v_BKND.shape[-1]
    # One head size for all; zeros change neither scores nor the columns kept (MLA).
    if v_head_dim < head_dim:
        v_BKND = functional.pad(v_BKND, (0, head_dim - v_head_dim))
    elif v_head_dim > head_dim:
        padding = (0, v_head_dim - head_dim)
        q_BHND, k_BKND = functional.pad(q_BHND, padding), functional.pad(k_BKND, padding)
    q_THD, k_TKD, v_TKD = (flatten(x, call.documents) for x in (q_BHND, k_BKND, v_BKND))
    outputs = []
    for run in call.runs:
        cu_seqlens, longest = _cu_seqlens(call.segments(run), q_THD.device)
        sinks = call.of_run(run).sinks_H
        out = _flash_attention_forward(
            q_THD[None, :, run.query],
            k_TKD[None, :, run.kv],
            v_TKD[None, :, run.kv],
            attention_mask=None,
            query_length=q_THD.shape[0],
            is_causal=True,
            dropout=call.dropout,
            softmax_scale=head_dim**-0.5 if call.scale is None else call.scale,
            softcap=call.softcap,
            cu_seq_lens_q=cu_seqlens,
            cu_seq_lens_k=cu_seqlens,
            max_length_q=longest,
            max_length_k=longest,
            attn_implementation=implementation,
            **({} if sinks is None else {"s_aux": sinks.to(q_THD.dtype)}),
        )
        outputs.append(out[0, ..., :v_head_dim])
    return unflatten(torch.cat(outputs, dim=1), call.documents)

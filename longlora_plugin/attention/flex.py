"""S²-Attn on FlexAttention: one block mask and one call a run of heads.

A token sees the interval from the start of its segment to itself, so which blocks a block of
queries needs follows from segment starts alone: no N × N mask is ever built.

Shape suffixes: N tokens of the flattened batch, S segments, M blocks of tokens.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from longlora_plugin.attention.call import AttentionCall
from longlora_plugin.attention.layout import Segments
from longlora_plugin.attention.packing import index_on
from longlora_plugin.attention.rows import flatten, unflatten
from longlora_plugin.attention.sdpa import by_run

BLOCK = 128
"""Tokens in a block, the size FlexAttention's kernels are made for."""


@lru_cache(maxsize=2)  # they lie in a GPU's memory, and packed training needs new ones each step
@torch.inference_mode(False)  # what is kept may be needed in training
def _block_masks(cuts: tuple[Segments, ...], length: int, device: torch.device) -> tuple[Any, ...]:
    """Block masks of one flattened row, one for each run of heads: 16 bytes · M² each."""
    return tuple(_block_mask(cut, length, device) for cut in cuts)


def _block_mask(cut: Segments, length: int, device: torch.device) -> Any:
    """Block mask of one flattened row, for all heads of one shift.

    Starts of segments never fall from one token to the next, so the blocks that a block of queries
    needs are an interval: from where its first token reaches back to, up to itself. Those that
    all its tokens see whole are an interval inside it. The lists are written down by arithmetic.
    """
    from torch.nn.attention.flex_attention import BlockMask

    blocks = -(-length // BLOCK)
    start_S, length_S = index_on(torch.tensor(cut), device).unbind(1)
    start_N = torch.arange(blocks * BLOCK, device=device)  # padding of the last block: itself
    start_N[:length] = start_S.repeat_interleave(length_S, output_size=length)
    row_M = torch.arange(blocks, device=device)
    first_M = start_N[::BLOCK] // BLOCK
    whole_M = torch.minimum(-(-start_N[BLOCK - 1 :: BLOCK] // BLOCK), row_M)
    # Partial: [first, whole) and the block itself. Full: [whole, row).
    before_M, full_M = whole_M - first_M, row_M - whole_M
    column = torch.arange(blocks, device=device)
    partial_MM = torch.where(column < before_M[:, None], first_M[:, None] + column, row_M[:, None])
    full_MM = (whole_M[:, None] + column).clamp(max=blocks - 1)

    def mask_mod(
        b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, kv: torch.Tensor
    ) -> torch.Tensor:
        return (kv <= q) & (kv >= start_N[q])

    return BlockMask.from_kv_blocks(
        *[x.int()[None, None] for x in (before_M + 1, partial_MM, full_M, full_MM)],
        BLOCK_SIZE=BLOCK,
        mask_mod=mask_mod,
        seq_lengths=(length, length),
    )


def flex_attention(
    q_BHND: torch.Tensor, k_BKND: torch.Tensor, v_BKND: torch.Tensor, call: AttentionCall
) -> torch.Tensor:
    """Attention inside segments with transformers' FlexAttention path, one call a run of heads.

    Returns:
        [B, N, H, D]; padding is zero.
    """
    from transformers.integrations.flex_attention import flex_attention_forward

    module = torch.nn.Module() if call.module is None else call.module
    outputs = []
    qkv_BNhD = (x.transpose(1, 2) for x in (q_BHND, k_BKND, v_BKND))
    masks = _block_masks(
        tuple(call.segments(run) for run in call.runs), call.documents.tokens, q_BHND.device
    )
    for mask, (run, *qkv_run) in zip(masks, by_run(call.runs, *qkv_BNhD, dim=2), strict=True):
        qkv_ThD = [flatten(x, call.documents) for x in qkv_run]
        out_1ThD, _ = flex_attention_forward(
            module,
            *[x[None].transpose(1, 2) for x in qkv_ThD],
            mask,
            scaling=q_BHND.shape[-1] ** -0.5 if call.scale is None else call.scale,
            softcap=call.softcap,
            s_aux=call.of_run(run).sinks_H,
            dropout=call.dropout,
        )
        outputs.append(out_1ThD[0])
    joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
    return unflatten(joined, call.documents)

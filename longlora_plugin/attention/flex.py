"""S²-Attn on FlexAttention: one block mask for all heads, built once a layout and kept.

A token sees the interval from the start of its segment to itself, so which blocks a block of
queries needs follows from segment starts alone: no N × N mask is ever built.

Shape suffixes: R runs of heads, H query heads, N tokens of the flattened batch, M blocks.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from longlora_plugin.attention.call import AttentionCall
from longlora_plugin.attention.layout import Segments
from longlora_plugin.attention.sdpa import flatten, unflatten

BLOCK = 128
"""Tokens in a block, the size FlexAttention's kernels are made for."""


@lru_cache(maxsize=8)
def _block_mask(
    cuts: tuple[Segments, ...], heads: tuple[int, ...], length: int, device: torch.device
) -> Any:
    """Block mask of one flattened row.

    Args:
        cuts: segments of each run of heads.
        heads: query heads of each run.
    """
    from torch.nn.attention.flex_attention import BlockMask

    blocks = -(-length // BLOCK)
    starts_RN = torch.arange(blocks * BLOCK).repeat(len(cuts), 1)
    for run, cut in enumerate(cuts):
        start_S, length_S = torch.tensor(cut).unbind(1)
        starts_RN[run, :length] = start_S.repeat_interleave(length_S)
    row_M = torch.arange(blocks)
    # Starts never fall from one token to the next: a block's first token reaches furthest back,
    # its last token least far.
    first_RM = starts_RN[:, ::BLOCK] // BLOCK
    whole_RM = -(-starts_RN[:, BLOCK - 1 :: BLOCK] // BLOCK)
    column = torch.arange(blocks)
    needed = (column >= first_RM[..., None]) & (column <= row_M[:, None])
    full = (column >= whole_RM[..., None]) & (column < row_M[:, None])

    def listed(chosen_RMM: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        order = torch.sort(chosen_RMM.int(), dim=-1, descending=True, stable=True).indices
        return chosen_RMM.sum(-1).int(), order.int()

    run_H = torch.arange(len(cuts)).repeat_interleave(torch.tensor(heads))
    partial_count, partial_index = listed(needed & ~full)
    full_count, full_index = listed(full)
    starts_RN, run_H = starts_RN.to(device), run_H.to(device)

    def mask_mod(
        b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, kv: torch.Tensor
    ) -> torch.Tensor:
        return (kv <= q) & (kv >= starts_RN[run_H[h], q])

    return BlockMask.from_kv_blocks(
        *[
            x[run_H.cpu()][None].to(device)
            for x in (partial_count, partial_index, full_count, full_index)
        ],
        BLOCK_SIZE=BLOCK,
        mask_mod=mask_mod,
        seq_lengths=(length, length),
    )


def flex_attention(
    q_BHND: torch.Tensor, k_BKND: torch.Tensor, v_BKND: torch.Tensor, call: AttentionCall
) -> torch.Tensor:
    """Attention inside segments with transformers' FlexAttention path.

    Returns:
        [B, N, H, D]; padding is zero.
    """
    from transformers.integrations.flex_attention import flex_attention_forward

    q_THD, k_TKD, v_TKD = (flatten(x, call.documents) for x in (q_BHND, k_BKND, v_BKND))
    block_mask = _block_mask(
        tuple(call.segments(run) for run in call.runs),
        tuple(run.query.stop - run.query.start for run in call.runs),
        q_THD.shape[0],
        q_THD.device,
    )
    out_1THD, _ = flex_attention_forward(
        torch.nn.Module() if call.module is None else call.module,
        *[x[None].transpose(1, 2) for x in (q_THD, k_TKD, v_TKD)],
        block_mask,
        scaling=q_BHND.shape[-1] ** -0.5 if call.scale is None else call.scale,
        softcap=call.softcap,
        s_aux=call.sinks_H,
        dropout=call.dropout,
    )
    return unflatten(out_1THD[0], call.documents)

"""S²-Attn on dense kernels, without a mask, a roll, or repeated keys and values.

Whole rows are *folded*: the tokens between the first and the last cut are a multiple of G, so
[B, h, n·G, D] becomes [B·n, h, G, D], a view of what attention modules produce. Packed or padded
rows are *gathered*: segments of like length become one batch, padded at the end, which causal
attention ignores by itself. Splitting and joining by `split`, `cat` and `index_select` keeps the
backward pass at one copy each, where slices would add up tensors of zeros.

Shape suffixes: B rows, H query heads, K KV heads, N tokens, D head size, S segments, L tokens a
segment, T real tokens of the whole batch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import lru_cache, partial

import torch
from torch.nn import functional

from longlora_plugin.attention.call import AttentionCall
from longlora_plugin.attention.layout import HeadRun, Segments, ends
from longlora_plugin.attention.packing import Documents, index_on
from longlora_plugin.attention.rows import of_one_size, take_rows, unflatten

Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, AttentionCall], torch.Tensor]
"""Causal attention of a batch of segments: (q_SHLD, k_SKLD, v_SKLD, call) → out_SHLD. The call's
sinks are those of the heads given."""
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""A kernel with its call."""


def sdpa_kernel(
    q_SHLD: torch.Tensor,
    k_SKLD: torch.Tensor,
    v_SKLD: torch.Tensor,
    call: AttentionCall,
) -> torch.Tensor:
    """PyTorch's scaled dot product attention.

    It knows no softcap: transformers' own sdpa path ignores it too, and training must not differ
    from evaluation in that.
    """
    if call.sinks_H is not None:
        raise ValueError(
            "sdpa has no attention sinks; write attn_implementation: eager, flash_attention_3 "
            "or flex_attention"
        )
    head_dim, v_head_dim = q_SHLD.shape[-1], v_SKLD.shape[-1]
    scale = head_dim**-0.5 if call.scale is None else call.scale
    q_SHLD, k_SKLD, v_SKLD = of_one_size(q_SHLD, k_SKLD, v_SKLD)
    grouped = q_SHLD.shape[1] != k_SKLD.shape[1]
    if grouped and not has_fused_grouped_heads(q_SHLD):
        repeats = q_SHLD.shape[1] // k_SKLD.shape[1]
        k_SKLD, v_SKLD = (x.repeat_interleave(repeats, dim=1) for x in (k_SKLD, v_SKLD))
        grouped = False
    out_SHLD = functional.scaled_dot_product_attention(
        q_SHLD,
        k_SKLD,
        v_SKLD,
        dropout_p=call.dropout,
        is_causal=True,
        scale=scale,
        enable_gqa=grouped,
    )
    return out_SHLD[..., :v_head_dim]


def has_fused_grouped_heads(q: torch.Tensor) -> bool:
    """Whether a kernel that never writes the scores out takes fewer KV heads than query heads.

    On a GPU only FlashAttention does: 16 bits, Ampere or later, heads of up to 256. Elsewhere
    `enable_gqa` falls to the kernel that writes N × N scores.
    """
    if q.device.type != "cuda":
        return True
    return (
        q.dtype in (torch.float16, torch.bfloat16)
        and q.shape[-1] <= 256
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
    )


def eager_kernel(
    q_SHLD: torch.Tensor,
    k_SKLD: torch.Tensor,
    v_SKLD: torch.Tensor,
    call: AttentionCall,
) -> torch.Tensor:
    """Attention written out, with softcap (Gemma 2) and sinks (gpt-oss); softmax in fp32 or more.

    Holds S × H × L × L scores, that is N·G of them, never N × N.
    """
    n_segments, heads, length, head_dim = q_SHLD.shape
    kv_heads = k_SKLD.shape[1]
    # Query heads that share a KV head become rows of one product, so nothing is repeated.
    q_SKRD = q_SHLD.reshape(n_segments, kv_heads, heads // kv_heads * length, head_dim)
    scale = head_dim**-0.5 if call.scale is None else call.scale
    scores = (q_SKRD @ k_SKLD.transpose(-1, -2)) * scale
    scores = scores.view(n_segments, heads, length, length)
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    later = torch.ones(length, length, dtype=torch.bool, device=q_SHLD.device).triu(1)
    scores = scores.masked_fill(later, -torch.inf).to(
        torch.promote_types(scores.dtype, torch.float32)
    )
    if call.sinks_H is not None:
        sink = (
            call.sinks_H.to(scores.dtype).view(1, heads, 1, 1).expand(n_segments, heads, length, 1)
        )
        probabilities = torch.cat([scores, sink], dim=-1).softmax(dim=-1)[..., :-1]
    else:
        probabilities = scores.softmax(dim=-1)
    probabilities = functional.dropout(probabilities.to(q_SHLD.dtype), p=call.dropout)
    out = probabilities.view(n_segments, kv_heads, -1, length) @ v_SKLD
    return out.view(n_segments, heads, length, v_SKLD.shape[-1])


def grouped_attention(
    q_BHND: torch.Tensor,
    k_BKND: torch.Tensor,
    v_BKND: torch.Tensor,
    call: AttentionCall,
    *,
    kernel: Kernel,
) -> torch.Tensor:
    """Attention inside segments with a dense kernel.

    Returns:
        [B, N, H, D], the order in which attention modules go on; padding is zero.
    """
    documents = call.documents
    outputs = []
    for run, q_run, k_run, v_run in by_run(call.runs, q_BHND, k_BKND, v_BKND, dim=1):
        attend: Attend = partial(_attend, kernel, call.of_run(run))
        if not documents.are_rows:
            outputs.append(_gathered(q_run, k_run, v_run, attend, call.segments(run), documents))
        elif documents.length <= call.full_attention_below:
            outputs.append(attend(q_run, k_run, v_run).transpose(1, 2))
        else:
            cuts = ends(documents.length, call.group_size, run.shift)
            outputs.append(_folded(q_run, k_run, v_run, attend, call.group_size, cuts))
    if documents.are_rows:
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
    return unflatten(outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1), documents)


def _attend(
    kernel: Kernel, call: AttentionCall, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> torch.Tensor:
    return kernel(q, k, v, call)


def by_run(
    runs: tuple[HeadRun, ...], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, dim: int
) -> list[tuple[HeadRun, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Split query, key and value along their heads; one `split` is one copy backward, where slices
    would add up tensors of zeros.
    """
    q_by_run = q.split([run.query.stop - run.query.start for run in runs], dim=dim)
    if k.shape[dim] == 1:
        k_by_run, v_by_run = [k] * len(runs), [v] * len(runs)
    else:
        kv_heads = [run.kv.stop - run.kv.start for run in runs]
        k_by_run, v_by_run = k.split(kv_heads, dim=dim), v.split(kv_heads, dim=dim)
    return list(zip(runs, q_by_run, k_by_run, v_by_run, strict=True))


def _folded(
    q_BHND: torch.Tensor,
    k_BKND: torch.Tensor,
    v_BKND: torch.Tensor,
    attend: Attend,
    group_size: int,
    cuts: tuple[int, int, int],
) -> torch.Tensor:
    lead, groups, tail = cuts
    batch = q_BHND.shape[0]
    middle = groups * group_size

    def fold(x_BhnD: torch.Tensor) -> torch.Tensor:
        b, h, n, d = x_BhnD.shape
        x = x_BhnD.transpose(1, 2).reshape(b * n // group_size, group_size, h, d)
        return x.transpose(1, 2)

    def whole_groups(*part: torch.Tensor) -> torch.Tensor:
        folded = attend(*[fold(x) for x in part]).transpose(1, 2)
        return folded.reshape(batch, middle, *folded.shape[2:])

    sizes = [size for size in (lead, middle, tail) if size]
    parts = list(zip(*(x.split(sizes, dim=2) for x in (q_BHND, k_BKND, v_BKND)), strict=True))
    if lead and lead == tail:
        first, *between, last = parts
        both = attend(*[torch.cat(pair) for pair in zip(first, last, strict=True)])
        first_out, last_out = both.transpose(1, 2).split(batch)
        pieces = [first_out, *[whole_groups(*part) for part in between], last_out]
    else:
        pieces = [
            whole_groups(*part) if part[0].shape[2] == middle else attend(*part).transpose(1, 2)
            for part in parts
        ]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)


ALONE = 512
"""Segments of this many tokens are worth a kernel call of their own, without padding."""


def _rounded(length: int) -> int:
    """Up to the next of four steps an octave, so that short segments share kernel calls."""
    if length >= ALONE:
        return length
    step = max(4, 1 << max(0, (length - 1).bit_length() - 3))
    return -(-length // step) * step


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # what is kept may be needed in training
def _gather_plan(
    cut: Segments, device: torch.device
) -> tuple[torch.Tensor, tuple[tuple[int, int], ...], torch.Tensor]:
    """How to gather segments into batches of like length.

    Returns:
        [P] tokens to take; (S, L) of each batch, P = Σ S·L; [T] the way back. What is added to a
        segment repeats its last token, after all that may look at it.
    """
    longest = max(length for _, length in cut)
    alike: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for start, length in cut:
        alike[min(longest, _rounded(length))].append((start, length))
    taken = []
    back = torch.empty(sum(length for _, length in cut), dtype=torch.long)
    offset = 0
    for width, members in alike.items():
        start_S, length_S = torch.tensor(members).unbind(1)
        column_L = torch.arange(width)
        token_SL = start_S[:, None] + torch.minimum(column_L, length_S[:, None] - 1)
        real_SL = column_L < length_S[:, None]
        place_SL = offset + torch.arange(token_SL.numel()).view_as(token_SL)
        back[token_SL[real_SL]] = place_SL[real_SL]
        offset += token_SL.numel()
        taken.append(token_SL.flatten())
    shapes = tuple((len(members), width) for width, members in alike.items())
    return index_on(torch.cat(taken), device), shapes, index_on(back, device)


def _gathered(
    q_BHND: torch.Tensor,
    k_BKND: torch.Tensor,
    v_BKND: torch.Tensor,
    attend: Attend,
    cut: Segments,
    documents: Documents,
) -> torch.Tensor:
    device = q_BHND.device
    taken_P, shapes, back_T = _gather_plan(cut, device)
    real_T = documents.real_on(device)
    if real_T is not None:
        taken_P = real_T[taken_P]
    sizes = [count * length for count, length in shapes]
    batches = zip(
        shapes,
        *(
            take_rows(x.transpose(1, 2).flatten(0, 1), taken_P, back_T, real_T).split(sizes)
            for x in (q_BHND, k_BKND, v_BKND)
        ),
        strict=True,
    )
    outputs = [
        attend(*[x.unflatten(0, shape).transpose(1, 2) for x in tensors])
        .transpose(1, 2)
        .flatten(0, 1)
        for shape, *tensors in batches
    ]
    return take_rows(torch.cat(outputs), back_T, None, back_T)

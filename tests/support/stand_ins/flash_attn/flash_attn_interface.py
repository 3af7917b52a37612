"""Forward passes with log-sum-exp and backward passes from it, in the signatures of 2.8.3.

q [T, H, D], k and v [S, K, D] of segments one after another; lse [H, T].
"""

from itertools import pairwise

import torch


def _weights(q, k, causal, scale):
    """Scores [H, T, S] of one segment; its last query sees its last key."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = torch.einsum("thd,shd->hts", q.float(), k.float()) * scale
    if causal:
        later = torch.ones(len(q), len(k), dtype=torch.bool).triu(len(k) - len(q) + 1)
        scores = scores.masked_fill(later, -torch.inf)
    return scores


def _segments(cu_q, cu_k):
    return [
        (slice(*a), slice(*b))
        for a, b in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True)
    ]


def _flash_attn_varlen_forward(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale,
    causal, window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None,
    return_softmax=False, block_table=None, leftpad_k=None, seqused_k=None, zero_tensors=False,
):  # fmt: skip
    assert not dropout_p
    assert not softcap
    assert window_size_left == -1
    out, lse = torch.empty_like(q), torch.empty(q.shape[1], len(q))
    for a, b in _segments(cu_seqlens_q, cu_seqlens_k):
        scores = _weights(q[a], k[b], causal, softmax_scale)
        lse[:, a] = scores.logsumexp(-1)
        values = v[b].repeat_interleave(q.shape[1] // v.shape[1], 1).float()
        out[a] = torch.einsum("hts,shd->thd", scores.softmax(-1), values).to(out.dtype)
    return out, lse, None, None


def _flash_attn_varlen_backward(
    dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
    max_seqlen_k, dropout_p, softmax_scale, causal, window_size_left=-1, window_size_right=-1,
    softcap=0.0, alibi_slopes=None, deterministic=False, rng_state=None, zero_tensors=False,
):  # fmt: skip
    repeats, kv_heads = q.shape[1] // k.shape[1], k.shape[1]
    for a, b in _segments(cu_seqlens_q, cu_seqlens_k):
        d_out = dout[a].float()
        weights = (_weights(q[a], k[b], causal, softmax_scale) - softmax_lse[:, a, None]).exp()
        keys, values = (x[b].repeat_interleave(repeats, 1).float() for x in (k, v))
        delta = (d_out * out[a].float()).sum(-1).T[..., None]
        d_scores = weights * (torch.einsum("thd,shd->hts", d_out, values) - delta) * softmax_scale
        dq[a] = torch.einsum("hts,shd->thd", d_scores, keys).to(dq.dtype)
        d_keys = torch.einsum("hts,thd->shd", d_scores, q[a].float())
        d_values = torch.einsum("hts,thd->shd", weights, d_out)
        for target, gradient in ((dk, d_keys), (dv, d_values)):
            by_head = gradient.unflatten(1, (kv_heads, repeats)).sum(2)
            target[b] = by_head.to(target.dtype)


def _boundaries(x):
    return torch.arange(0, (len(x) + 1) * x.shape[1], x.shape[1])


def _flash_attn_forward(
    q, k, v, dropout_p, softmax_scale, causal, window_size_left=-1, window_size_right=-1,
    softcap=0.0, alibi_slopes=None, return_softmax=False,
):  # fmt: skip
    out, lse, *_ = _flash_attn_varlen_forward(
        q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), _boundaries(q), _boundaries(k),
        0, 0, dropout_p, softmax_scale, causal, window_size_left, softcap=softcap,
    )  # fmt: skip
    lse_BHN = lse.unflatten(1, q.shape[:2]).transpose(0, 1).contiguous()
    return out.view(q.shape), lse_BHN, None, None


def _flash_attn_backward(
    dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal,
    window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None,
    deterministic=False, rng_state=None,
):  # fmt: skip
    tensors = (x.flatten(0, 1) for x in (dout, q, k, v, out))
    gradients = [torch.empty_like(x.flatten(0, 1)) for x in (dq, dk, dv)]
    _flash_attn_varlen_backward(
        *tensors, softmax_lse.transpose(0, 1).flatten(1), *gradients, _boundaries(q),
        _boundaries(k), 0, 0, dropout_p, softmax_scale, causal,
    )  # fmt: skip
    for target, gradient in zip((dq, dk, dv), gradients, strict=True):
        target.copy_(gradient.view(target.shape))


class _Varlen(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, cu_q, cu_k, scale, causal):
        out, lse, *_ = _flash_attn_varlen_forward(q, k, v, cu_q, cu_k, 0, 0, 0.0, scale, causal)
        ctx.save_for_backward(q, k, v, out, lse, cu_q, cu_k)
        ctx.scale, ctx.causal = scale, causal
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, out, lse, cu_q, cu_k = ctx.saved_tensors
        gradients = [torch.empty_like(x) for x in (q, k, v)]
        _flash_attn_varlen_backward(
            dout, q, k, v, out, lse, *gradients, cu_q, cu_k, 0, 0, 0.0, ctx.scale, ctx.causal
        )
        return *gradients, None, None, None, None


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
    softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False, block_table=None,
):  # fmt: skip
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    return _Varlen.apply(q, k, v, cu_seqlens_q, cu_seqlens_k, scale, causal)


def flash_attn_func(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
    alibi_slopes=None, deterministic=False, return_attn_probs=False,
):  # fmt: skip
    out = flash_attn_varlen_func(
        q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), _boundaries(q), _boundaries(k), 0, 0,
        softmax_scale=softmax_scale, causal=causal,
    )  # fmt: skip
    return out.view(q.shape)

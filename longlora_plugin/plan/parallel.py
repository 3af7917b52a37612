"""What S²-Attn sends under context parallelism, compared with ring attention and Ulysses.

A row of N tokens lies in P contiguous shards of n = N/P. In S² a token attends to the start of its
own segment at most, so a process needs K and V of only the tokens of the segment that its first
token lies in: the halo, at most G − 1 tokens of the processes before it. Ring attention sends all
of K and V on P − 1 times; Ulysses exchanges Q, K, V and the output, a process keeping 1/P of them.

Bytes are those of one layer's forward pass on the busiest process; the backward pass sends the
gradients of the same tensors.
"""

from __future__ import annotations

from longlora_plugin.attention.layout import S2, AttentionPattern, halo_tokens, head_runs
from longlora_plugin.plan.shape import ModelShape


def halo_bytes(
    shape: ModelShape,
    sequence_len: int,
    processes: int,
    group_size: int,
    *,
    pattern: AttentionPattern = S2,
    bytes_each: int = 2,
) -> int:
    """Σ over runs of heads (halo tokens · their KV heads · (d_k + d_v) · bytes), the most of any
    process. Where the group divides the shard: G/2 tokens for the shifted half, none for the plain.
    """
    shard = sequence_len // processes
    runs = head_runs(pattern, shape.heads, shape.kv_heads, group_size)
    return max(
        sum(
            halo_tokens(shard, group_size, run.shift, rank)
            * (run.kv.stop - run.kv.start)
            * (shape.head_dim + shape.value_dim)
            * bytes_each
            for run in runs
        )
        for rank in range(processes)
    )


def ring_bytes(shape: ModelShape, sequence_len: int, processes: int, bytes_each: int = 2) -> int:
    """K and V of a shard, sent on P − 1 times."""
    shard = sequence_len // processes
    width = shape.kv_heads * (shape.head_dim + shape.value_dim) * bytes_each
    return (processes - 1) * shard * width


def ulysses_bytes(shape: ModelShape, sequence_len: int, processes: int, bytes_each: int = 2) -> int:
    """Q, K and V there and the output back, all but the part that stays."""
    shard = sequence_len // processes
    width = (shape.heads + shape.kv_heads) * (shape.head_dim + shape.value_dim) * bytes_each
    return shard * width * (processes - 1) // processes

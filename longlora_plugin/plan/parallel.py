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


def bytes_sent(
    shape: ModelShape,
    sequence_len: int,
    processes: int,
    group_size: int | None = None,
    *,
    pattern: AttentionPattern = S2,
    bytes_each: int = 2,
) -> dict[str, int]:
    """Bytes for one layer by `ring`, `ulysses` and, where there is a group, S²'s `halo`.

    Where the group divides the shard, the halo is G/2 tokens for the shifted half of the heads and
    none for the plain one.
    """
    shard = sequence_len // processes
    width = (shape.head_dim + shape.value_dim) * bytes_each
    sent = {
        # K and V of a shard, sent on P − 1 times.
        "ring": (processes - 1) * shard * shape.kv_heads * width,
        # Q, K and V there and the output back, all but the part that stays.
        "ulysses": shard * (shape.heads + shape.kv_heads) * width * (processes - 1) // processes,
    }
    if group_size is not None:
        runs = head_runs(pattern, shape.heads, shape.kv_heads, group_size)
        sent["halo"] = width * max(
            sum(
                halo_tokens(shard, group_size, run.shift, rank) * (run.kv.stop - run.kv.start)
                for run in runs
            )
            for rank in range(processes)
        )
    return sent

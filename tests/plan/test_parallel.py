"""What context parallelism sends, and what it leaves each GPU to hold."""

from __future__ import annotations

import pytest
from transformers import LlamaConfig

from longlora_plugin.attention.layout import group_sizes_that_divide, halo_tokens
from longlora_plugin.plan.memory import Training, memory
from longlora_plugin.plan.parallel import bytes_sent
from longlora_plugin.plan.parameters import count_parameters
from longlora_plugin.plan.shape import ModelShape, meta_model, shape_of


def heads_of(heads: int, kv_heads: int) -> ModelShape:
    return ModelShape(
        hidden=heads * 128, vocab=1, layers=1, heads=heads, kv_heads=kv_heads, head_dim=128,
        value_dim=128, rotary_dim=128, windows=(None,), projection_weights=0, ffn_weights=0,
        head_weights=0, norm_elements=0,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("kv_heads", "length", "group", "halo", "ring", "ulysses"),
    [
        (32, 102_400, 25_600, 105, 1470, 367),
        (32, 102_400, 6_400, 26, 1470, 367),
        (32, 262_144, 8_192, 34, 3760, 940),
        (32, 1_048_576, 8_192, 34, 15_000, 3760),
        (8, 262_144, 8_192, 8.4, 940, 587),
        (8, 1_048_576, 8_192, 8.4, 3760, 2350),
    ],
)
def test_bytes_a_layer_are_the_designs_table(
    kv_heads: int, length: int, group: int, halo: float, ring: float, ulysses: float
) -> None:
    """MB, forward, 8 processes, bf16, 32 heads of 128, the busiest process."""
    sent = bytes_sent(heads_of(32, kv_heads), length, 8, group)
    printed = {kind: float(f"{amount / 1e6:.3g}") for kind, amount in sent.items()}
    assert printed == {"halo": pytest.approx(halo, rel=0.02), "ring": ring, "ulysses": ulysses}


def test_where_the_group_divides_a_shard_the_halo_is_half_a_group_of_half_the_heads() -> None:
    shape = heads_of(32, 8)
    for length in (131_072, 1_048_576):
        assert bytes_sent(shape, length, 8, 4096)["halo"] == 2048 * 4 * 2 * 128 * 2


def test_the_halo_is_the_tokens_of_the_first_tokens_segment_before_the_shard() -> None:
    for shard, group, shift, rank in ((10, 8, 0, 1), (10, 8, 4, 3), (4, 16, 8, 3), (6, 6, 3, 2)):
        first = rank * shard
        segment = (first + shift) // group
        before = [i for i in range(first) if (i + shift) // group == segment]
        assert halo_tokens(shard, group, shift, rank) == len(before)


def test_group_sizes_that_divide_a_shard_are_even_divisors() -> None:
    assert group_sizes_that_divide(24) == [2, 4, 6, 8, 12, 24]
    assert group_sizes_that_divide(15) == []


def test_context_parallel_processes_share_the_tokens_of_a_row() -> None:
    model = meta_model(LlamaConfig(num_hidden_layers=2))
    shape, counts = shape_of(model), count_parameters(model, lora_r=8, target_modules=["q_proj"])
    whole = memory(shape, counts, Training(8192, gpus=4))
    shared = memory(shape, counts, Training(8192, gpus=4, context_parallel=4))
    assert shared.activations == whole.activations / 4
    assert shared.loss == whole.loss / 4
    assert Training(8192, gpus=8, context_parallel=4).data_parallel == 2

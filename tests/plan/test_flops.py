"""FLOPs: against the paper's Table 11, torch's counter and the definition of S²-Attn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_material import CONFIGS, plain_shape, speed_up
from reference import head_masks
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    MistralConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen3Config,
)

from longlora_plugin.plan.flops import (
    StepKind,
    attended_pairs,
    forward_flops,
    step_flops,
)
from longlora_plugin.plan.shape import ModelShape, meta_model, shape_of

# Table 11 of the paper, Llama2-7B: length, full or S², attention, projections, FFN, others, total.
TABLE_11 = [
    (8192, "full", 35.2, 35.2, 70.9, 2.2, 143.5),
    (8192, "s2", 8.8, 35.2, 70.9, 2.2, 117.1),
    (16384, "full", 140.7, 70.4, 141.8, 4.3, 357.2),
    (16384, "s2", 35.2, 70.4, 141.8, 4.3, 251.7),
    (32768, "full", 562.9, 140.7, 283.7, 8.7, 996.0),
    (32768, "s2", 140.7, 140.7, 283.7, 8.7, 573.8),
    (65536, "full", 2251.8, 281.5, 567.4, 17.3, 3118.0),
    (65536, "s2", 562.9, 281.5, 567.4, 17.3, 1429.1),
]


@pytest.mark.parametrize(
    ("length", "kind", "attention", "projections", "ffn", "others", "total"), TABLE_11
)
def test_forward_flops_are_table_11_to_the_printed_digit(
    shape_7b: ModelShape, length: int, kind: str, attention: float, projections: float,
    ffn: float, others: float, total: float,
) -> None:  # fmt: skip
    counted = forward_flops(shape_7b, length, None if kind == "full" else length // 4).tera()
    assert round(counted["attention"], 1) == attention
    assert round(counted["projections"], 1) == projections
    assert round(counted["ffn"], 1) == ffn
    assert round(counted["others"], 1) == others
    # The paper adds up what it printed; the unrounded total may differ in the last digit.
    assert round(attention + projections + ffn + others, 1) == total
    assert counted["total"] == pytest.approx(total, abs=0.1)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_matrix_products_are_those_torch_counts(config: Any) -> None:
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    length = 48
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=torch.zeros(1, length, dtype=torch.long), use_cache=False)
    by_operation = {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}
    shape = shape_of(meta_model(config))
    counted = forward_flops(shape, length)
    # The only batched products besides attention's two are RoPE's outer product of frequencies.
    rope = 2 * length * (shape.rotary_dim // 2)
    assert by_operation["aten.bmm"] == counted.attention + rope
    head = 2 * length * config.vocab_size * config.hidden_size
    matrices = 2 * length * shape.ffn_weights + counted.projections + head
    assert by_operation.get("aten.mm", 0) + by_operation.get("aten.addmm", 0) == matrices


def test_query_and_key_norms_run_once_a_head() -> None:
    config = Qwen3Config(
        hidden_size=64, head_dim=32, num_attention_heads=4, num_key_value_heads=2,
        num_hidden_layers=3, intermediate_size=96, vocab_size=100,
    )  # fmt: skip
    assert shape_of(meta_model(config)).norm_elements == 7 * 64 + 3 * (4 + 2) * 32


def test_of_a_mixture_only_the_routed_experts_count() -> None:
    config = MixtralConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2,
    )  # fmt: skip
    router = 8 * 32
    assert shape_of(meta_model(config)).ffn_weights == 2 * (2 * 3 * 32 * 64 + router)


@settings(deadline=None, max_examples=30)
@given(
    length=st.integers(1, 40),
    half=st.integers(1, 12),
    heads=st.sampled_from([(1, 1), (3, 1), (4, 2), (5, 5), (6, 3)]),
)
def test_causal_pairs_are_those_of_the_definition(
    length: int, half: int, heads: tuple[int, int]
) -> None:
    query_heads, kv_heads = heads
    shape = plain_shape(heads=query_heads, kv_heads=kv_heads)
    counted = attended_pairs(shape, length, None, 2 * half, causal=True)
    assert counted == int(head_masks([length], 2 * half, query_heads, kv_heads).sum())
    full = attended_pairs(shape, length, None, None, causal=True)
    assert full == query_heads * int(torch.ones(length, length).tril().sum())


@settings(deadline=None, max_examples=30)
@given(length=st.integers(1, 40), window=st.integers(1, 50))
def test_a_sliding_window_limits_the_pairs_and_keeps_s2_out(length: int, window: int) -> None:
    counted = attended_pairs(plain_shape(heads=2), length, window, 8, causal=True)
    seen = torch.ones(length, length).tril() - torch.ones(length, length).tril(-window)
    assert counted == 2 * int(seen.sum())


def test_mistral_v01_slides_in_every_layer_so_s2_saves_nothing() -> None:
    shape = shape_of(meta_model(MistralConfig(num_hidden_layers=2)))
    assert shape.windows == (4096, 4096)
    assert forward_flops(shape, 32768, 8192) == forward_flops(shape, 32768)
    assert speed_up(shape, 32768, 8192) == 1


def test_only_the_full_layers_of_a_mixed_model_get_cheaper() -> None:
    config = Qwen2Config(
        num_hidden_layers=4, use_sliding_window=True, sliding_window=1024, max_window_layers=1,
        hidden_size=64, num_attention_heads=4, num_key_value_heads=4,
    )  # fmt: skip
    shape = shape_of(meta_model(config))
    assert shape.windows == (None, 1024, 1024, 1024)
    saved = forward_flops(shape, 8192).attention - forward_flops(shape, 8192, 2048).attention
    assert saved == 4 * 8192 * (8192 - 2048) * 64


def test_a_step_is_forward_recomputation_and_backward(shape_7b: ModelShape) -> None:
    forward = forward_flops(shape_7b, 4096, causal=True)
    frozen = step_flops(shape_7b, 4096)
    trained = step_flops(shape_7b, 4096, kind=StepKind(trains_base=True))
    kept = step_flops(shape_7b, 4096, kind=StepKind(checkpointing=False, flash=False))
    assert frozen.ffn == 3 * forward.ffn
    assert trained.ffn == 4 * forward.ffn
    assert kept.ffn == 2 * forward.ffn
    assert frozen.attention == 4.5 * forward.attention
    assert kept.attention == 3 * forward.attention
    lora = step_flops(shape_7b, 4096, kind=StepKind(lora_weights=1000))
    assert lora.projections - frozen.projections == 2 * 4096 * 1000 * 4


def test_the_planned_speed_up_follows_table_12(shape_7b: ModelShape) -> None:
    """Hours of LoRA over LongLoRA: 1.15, 1.24, 1.48, 1.77; FLOPs alone promise a little more."""
    hours = {8192: 6.0 / 5.2, 16384: 14.0 / 11.3, 32768: 36.5 / 24.6, 65536: 92.5 / 52.4}
    for length, measured in hours.items():
        planned = speed_up(shape_7b, length, length // 4)
        assert measured < planned < 1.16 * measured

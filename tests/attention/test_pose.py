"""`attention_pattern: pose`: a pass equals one over short rows whose positions skip."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from attention_material import Enable, assert_near
from family_runs import TOLERANCE, InFloat64, build, error, tokens
from flash_stand_in import FlashLibrary, each_flash_library
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM, GPT2Config, MistralConfig

from longlora_plugin.attention import ShiftedAttention, install, shifted_sparse_attention
from longlora_plugin.attention.layout import POSE, AttentionPattern
from longlora_plugin.attention.pose import generator_of_pass, skipped_positions

TARGET = 96
IDS = torch.randint(97, (2, 24), generator=torch.Generator().manual_seed(1))


def tiny_llama(**config: Any) -> Any:
    return tiny.llama(weights=3.0, max_position_embeddings=TARGET, **config).double().train()


@pytest.fixture
def skip(enable: Enable) -> Enable:
    """`enable_shifted_attention` with the pattern; handles are removed after the test."""

    def skip(model: Any, **options: Any) -> ShiftedAttention:
        return enable(model, **{"pattern": POSE, "target_length": TARGET, **options})

    return skip


def short_rows(model: Any, ids: torch.Tensor, sizes: list[int]) -> list[torch.Tensor]:
    """Logits of each segment as a row of its own, with the positions that the next pass draws."""
    positions = skipped_positions(sizes, TARGET, generator_of_pass()).split(sizes)
    return [
        # With a mask, transformers takes a jump in the positions for what it is.
        model(
            input_ids=part[None],
            position_ids=place[None],
            attention_mask=torch.ones_like(part)[None],
            use_cache=False,
        ).logits[0]
        for part, place in zip(ids.split(sizes), positions, strict=True)
    ]


@given(st.lists(st.integers(1, 20), min_size=1, max_size=6), st.integers(20, 60))
def test_each_segment_is_two_runs_of_positions_up_to_the_target(
    sizes: list[int], target: int
) -> None:
    for place in skipped_positions(sizes, target, generator_of_pass()).split(sizes):
        assert place[0] == 0
        assert place[-1] < target
        steps = place.diff()
        assert (steps >= 1).all()
        assert (steps > 1).sum() <= 1


def test_a_full_segment_skips_nothing_and_others_reach_every_position() -> None:
    draws = torch.Generator().manual_seed(0)
    assert torch.equal(skipped_positions([12], 12, draws), torch.arange(12))
    seen = torch.cat([skipped_positions([4], 10, draws) for _ in range(300)])
    assert set(seen.tolist()) == set(range(10))


# (batch, real tokens' places in the flattened rows, sizes of their segments)
BATCHES = {
    "rows": ({"input_ids": IDS}, slice(None), [8] * 6),
    "packed": (
        {
            "input_ids": IDS[:1],
            "position_ids": torch.cat([torch.arange(13), torch.arange(11)])[None],
        },
        slice(0, 24),
        [8, 5, 8, 3],
    ),
    "padded right": (
        {
            "input_ids": IDS,
            "attention_mask": (torch.arange(24) < torch.tensor([[24], [17]])).long(),
        },
        [*range(24), *range(24, 41)],
        [8, 8, 8, 8, 8, 1],
    ),
    "padded left": (
        {"input_ids": IDS, "attention_mask": (torch.arange(24) >= torch.tensor([[0], [5]])).long()},
        [*range(24), *range(29, 48)],
        [8, 8, 8, 8, 8, 3],
    ),
}


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", BATCHES)
def test_a_pass_equals_short_rows_with_skipped_positions(
    kind: str, implementation: str, skip: Enable
) -> None:
    batch, real, sizes = BATCHES[kind]
    plain, model = tiny_llama(), tiny_llama(attn_implementation=implementation)
    torch.manual_seed(3)
    expected = torch.cat(short_rows(plain, batch["input_ids"].flatten()[real], sizes))
    handle = skip(model)
    torch.manual_seed(3)
    found = model(**batch).logits.flatten(0, 1)[real]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    assert handle.calls == 2
    torch.manual_seed(4)
    assert (model(**batch).logits.flatten(0, 1)[real] - expected).abs().max() > 1e-3, "drawn anew"


@pytest.mark.parametrize(
    "name", ["qwen3", "gpt_neox", "phi3", "cohere", "deepseek_v3", "mixtral", "glm4", "nemotron"]
)
def test_a_pass_of_a_family_equals_short_rows(name: str, skip: Enable) -> None:
    plain, model = build(name, "sdpa"), build(name, "sdpa")
    ids, sizes = tokens(), [8, 8, 5]
    skip(model)
    with InFloat64():
        torch.manual_seed(3)
        expected = torch.cat(short_rows(plain, ids[0], sizes))
        torch.manual_seed(3)
        found = model(ids, use_cache=False).logits[0]
    assert error(found, expected) < TOLERANCE


def test_processes_draw_different_positions_and_equally_often(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn, left = [], []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for rank, segments in enumerate(([8, 8, 8], [8, 8, 8], [8])):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        torch.manual_seed(3)
        drawn.append(skipped_positions(segments, TARGET, generator_of_pass()))
        left.append(torch.rand(()))
    assert not torch.equal(drawn[0], drawn[1])
    assert left[0] == left[1] == left[2]


def test_scores_that_depend_on_the_position_are_refused(skip: Enable) -> None:
    with pytest.raises(ValueError, match="Ministral3Attention scales its scores by the position"):
        skip(build("ministral3", "sdpa"))


def test_a_layer_that_is_run_again_with_its_own_rotary_embedding_is_an_error(skip: Enable) -> None:
    model = tiny_llama()
    skip(model)
    again = (torch.zeros(1, 8, 32), torch.arange(8)[None])
    with pytest.raises(ValueError, match="LlamaRotaryEmbedding has them inside of its layers"):
        model.model.rotary_emb(*again)
    model.eval().model.rotary_emb(*again)


@pytest.mark.parametrize("checkpointing", [None, True, False])
def test_gradients_are_those_of_short_rows_also_with_checkpointing(
    checkpointing: bool | None, skip: Enable
) -> None:
    model, plain = tiny_llama(), tiny_llama()
    torch.manual_seed(3)
    torch.cat(short_rows(plain, IDS[0], [8] * 3)).square().sum().backward()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    skip(model)
    torch.manual_seed(3)
    model(input_ids=IDS[:1]).logits.square().sum().backward()
    for (name, found), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-9, atol=1e-9, msg=name)


def test_evaluation_full_steps_and_a_removed_handle_are_the_models_own(skip: Enable) -> None:
    model = tiny_llama()
    own = model(input_ids=IDS).logits
    handle = skip(model)
    assert torch.equal(model.eval()(input_ids=IDS).logits, own)
    handle.active = False
    assert torch.equal(model.train()(input_ids=IDS).logits, own)
    handle.active = True
    assert not torch.equal(model(input_ids=IDS).logits, own)
    handle.remove()
    assert torch.equal(model(input_ids=IDS).logits, own)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_documents_of_up_to_full_attention_below_tokens_skip_as_one_segment(skip: Enable) -> None:
    model = tiny_llama()
    torch.manual_seed(3)
    expected = torch.cat(short_rows(model, IDS[0], [24]))
    skip(model, full_attention_below=24)
    torch.manual_seed(3)
    torch.testing.assert_close(model(input_ids=IDS[:1]).logits[0], expected, rtol=0, atol=1e-10)


def test_a_model_whose_positions_cannot_skip_is_refused(skip: Enable) -> None:
    small = {"vocab_size": 97, "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    gpt2 = AutoModelForCausalLM.from_config(
        GPT2Config(vocab_size=97, n_embd=32, n_layer=1, n_head=2)
    )
    with pytest.raises(ValueError, match="has them nowhere; write attention_pattern: s2"):
        skip(gpt2)
    window = MistralConfig(**small, **heads, sliding_window=16)
    with pytest.raises(ValueError, match="covers no layer"):
        skip(AutoModelForCausalLM.from_config(window))


def test_layers_that_attend_across_segments_are_refused(skip: Enable) -> None:
    from transformers import Qwen2Config

    mixed = Qwen2Config(
        vocab_size=97, num_hidden_layers=2, hidden_size=32, intermediate_size=32,
        num_attention_heads=4, num_key_value_heads=2, use_sliding_window=True, sliding_window=16,
        max_window_layers=1,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"within segments, and some do not: 1 × .*window of 16"):
        skip(AutoModelForCausalLM.from_config(mixed))


def test_what_skipped_positions_need_is_asked_for(
    enable: Enable, skip: Enable, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = "the pattern pose needs whole rows of a model that no other one is compared with"
    with pytest.raises(ValueError, match="the pattern pose needs target_length"):
        skip(tiny_llama(), target_length=None)
    enable(policy := tiny_llama())
    with pytest.raises(ValueError, match=message):
        skip(tiny_llama()).follow(policy)
    with pytest.raises(ValueError, match=message):
        skip(tiny_llama(), follows=enable(tiny_llama()))
    monkeypatch.setattr(install, "shards_of", lambda *arguments: object())
    with pytest.raises(ValueError, match=message):
        skip(model := tiny_llama())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_pattern_that_skips_positions_must_not_shift(skip: Enable) -> None:
    shifted = AttentionPattern(
        "mine", lambda heads, size: [size // 2] * heads, skips_positions=True
    )
    model = tiny_llama()
    skip(model, pattern=shifted)
    with pytest.raises(ValueError, match=r"'mine' returned \[4, 4\].*2 shifts from 0 to 0"):
        model(input_ids=IDS)


def test_positions_that_fit_no_documents_of_the_layers_are_an_error(skip: Enable) -> None:
    model = tiny_llama(attn_implementation="sdpa")
    skip(model)
    cut = torch.tensor([0, 10, 24], dtype=torch.int32)
    with pytest.raises(ValueError, match="attend to other documents than the model's positions"):
        model(
            input_ids=IDS[:1],
            cu_seq_lens_q=cut,
            cu_seq_lens_k=cut,
        )


def of_segments(query: torch.Tensor) -> torch.Tensor:
    parts = query.split(8, dim=2)
    return torch.cat([scaled_dot_product_attention(x, x, x, is_causal=True) for x in parts], dim=2)


def test_tensors_alone_have_the_segments_without_a_shift() -> None:
    query = torch.randn(1, 4, 24, 8, dtype=torch.float64)
    found = shifted_sparse_attention(query, query, query, group_size=8, pattern=POSE)
    torch.testing.assert_close(found, of_segments(query))


@each_flash_library
def test_flash_kernels_are_called_once_for_all_heads(flash: FlashLibrary) -> None:
    query = torch.randn(1, 4, 24, 8).bfloat16()
    found = shifted_sparse_attention(
        query, query, query, group_size=8, pattern=POSE, backend=flash.implementation
    )
    assert_near(found, of_segments(query), 2e-2)
    assert [call.query[1] for call in flash.calls] == [4]

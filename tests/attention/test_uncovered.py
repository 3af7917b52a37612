"""What S²-Attn does not cover: whole families, other layers of a covered family, images."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attention_material import Enable
from families import FAMILIES
from family_models import IMAGE_TOKENS, build_family
from family_runs import (
    TOKENS,
    TOLERANCE,
    build,
    error,
    logits,
    logits_in_float64,
    masked_per_head,
    refusal,
    tokens,
)
from unsupported_families import UNSUPPORTED

from longlora_plugin.plan.flops import forward_flops
from longlora_plugin.plan.shape import shape_of


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_family_is_refused_with_the_reason(name: str) -> None:
    assert refusal(name).count(UNSUPPORTED[name][1]) == 1


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_plan_lets_shifted_attention_save_nothing_in_an_unsupported_family(name: str) -> None:
    model = build_family(name, UNSUPPORTED[name][0], "eager")
    shape = shape_of(model)
    assert shape.full_layers == shape.unshifted
    assert forward_flops(shape, 64, 8) == forward_flops(shape, 64)


def test_window_as_long_as_the_context_counts_as_full_attention(enable: Enable) -> None:
    family = replace(FAMILIES["mistral"], config={"sliding_window": 256})
    model = build_family("mistral", family, "sdpa")
    assert enable(model).layers == 2
    padding = torch.ones(2, TOKENS, dtype=torch.long)
    padding[1, 13:] = 0
    ids = tokens(2)
    padded = logits_in_float64(model, ids, attention_mask=padding)
    assert error(padded[1, :13], logits_in_float64(model, ids[1:, :13])[0]) < TOLERANCE


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["gemma3_text", "llama4_text", "minimax_m3_vl_text"])
def test_stock_layers_keep_their_mask_in_rows_shorter_than_their_window(
    name: str, implementation: str, padded: bool, enable: Enable
) -> None:
    wide = {"sliding_window": 64, "attention_chunk_size": 64, "index_block_size": 64}
    family = FAMILIES[name]
    config = {key: wide.get(key, value) for key, value in family.config.items()}
    model, ids = build_family(name, replace(family, config=config), implementation), tokens()
    padding = torch.ones(1, TOKENS, dtype=torch.long)
    if padded:
        padding[0, 13:] = 0
    documents = [13, TOKENS - 13] if padded else [TOKENS]
    with masked_per_head(model, name, implementation, documents):
        expected = logits_in_float64(model, ids, attention_mask=padding)
    enable(model)
    actual = logits_in_float64(model, ids, attention_mask=padding)
    real = slice(0, 13 if padded else TOKENS)
    assert error(actual[:, real], expected[:, real]) < TOLERANCE


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_layer_left_in_evaluation_keeps_its_stock_mask(
    implementation: str, padded: bool, enable: Enable
) -> None:
    model, ids = build("llama", implementation), tokens()
    padding = torch.ones(1, TOKENS, dtype=torch.long)
    if padded:
        padding[0, 13:] = 0
    model.model.layers[0].eval()
    documents = [13, TOKENS - 13] if padded else [TOKENS]
    with masked_per_head(model, "llama", implementation, documents, only=(1,)):
        expected = logits_in_float64(model, ids, attention_mask=padding)
    handle = enable(model)
    actual = logits_in_float64(model, ids, attention_mask=padding)
    assert handle.calls == 1
    assert error(actual[:, : documents[0]], expected[:, : documents[0]]) < TOLERANCE


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_images_go_through_the_stock_vision_tower(implementation: str, enable: Enable) -> None:
    model, ids = build("llava", implementation), tokens()
    ids[0, 2:6] = IMAGE_TOKENS["image_token_id"]
    pixels = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(3)).double()
    with masked_per_head(model, "llava", implementation):
        expected = logits_in_float64(model, ids, pixel_values=pixels)
    handle = enable(model)
    actual = logits_in_float64(model, ids, pixel_values=pixels)
    assert error(actual, expected) < TOLERANCE
    assert handle.calls == 2
    assert error(logits_in_float64(model, ids, pixel_values=2 * pixels), actual) > 1e-3


def test_image_tokens_that_see_each_other_are_refused_not_made_causal(enable: Enable) -> None:
    model, ids = build("gemma3", "sdpa"), tokens()
    ids[0, 2:6] = IMAGE_TOKENS["image_token_id"]
    images = (ids == IMAGE_TOKENS["image_token_id"]).long()
    pixels = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(3)).double()
    enable(model)
    with pytest.raises(ValueError, match="needs plain causal attention"):
        logits(model, ids, pixel_values=pixels, token_type_ids=images)

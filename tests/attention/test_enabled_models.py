"""Copies, several models, evaluation and removal: what of a model S²-Attn changes, and when."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from attention_material import KINDS, Enable, assert_same, batches, registries, tiny_llama, train

from longlora_plugin.attention import enable_shifted_attention


@pytest.mark.parametrize("kind", KINDS)
def test_a_deep_copy_trains_with_shifted_attention_until_the_handle_is_removed(
    kind: str, enable: Enable
) -> None:
    model, batch = tiny_llama(), batches()[kind]
    full = train(model, batch)
    handle = enable(model)
    wanted = train(model, batch)
    twin = copy.deepcopy(copy.deepcopy(model))
    assert_same(train(twin, batch), wanted)
    handle.remove()
    assert_same(train(twin, batch), full)
    handle = enable(twin)  # nothing of the old handle is left on it
    assert_same(train(twin, batch), wanted)
    assert_same(train(model, batch), full)


def test_a_deep_copy_that_is_gone_is_not_kept_alive(enable: Enable) -> None:
    model = tiny_llama()
    handle = enable(model)
    twin = copy.deepcopy(model)
    assert len(handle._copies) == 2
    del twin
    gc.collect()
    assert len(handle._copies) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_two_models_keep_their_own_groups_and_a_third_its_full_attention(
    kind: str, enable: Enable
) -> None:
    batch = batches()[kind]
    alone = []
    for group_size in (8, 24):
        model = tiny_llama()
        handle = enable(model, group_size=group_size)
        alone.append(train(model, batch))
        handle.remove()
    full = train(tiny_llama(), batch)
    small, large, untouched = tiny_llama(), tiny_llama(), tiny_llama()
    handles = [enable(small, group_size=8), enable(large, group_size=24)]
    assert_same(train(small, batch), alone[0])
    assert_same(train(large, batch), alone[1])
    assert_same(train(untouched, batch), full)
    handles[0].remove()
    assert_same(train(small, batch), full)
    assert_same(train(large, batch), alone[1])


def test_enabling_twice_is_refused_and_the_first_stays(enable: Enable) -> None:
    model = tiny_llama()
    handle = enable(model)
    with pytest.raises(ValueError, match=r"already enabled on this model; remove\(\) it first"):
        enable_shifted_attention(model, group_size=8)
    train(model, batches()["padded"])
    assert handle.calls == 2


def test_removing_twice_is_harmless_even_beside_another_model(enable: Enable) -> None:
    before = registries()
    one, other = tiny_llama(), tiny_llama()
    first, second = enable(one), enable(other)
    first.remove()
    first.remove()
    train(other, batches()["padded"])
    assert second.calls == 2
    second.remove()
    second.remove()
    assert registries() == before


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_and_removal_are_stock_bit_for_bit(
    kind: str, implementation: str, enable: Enable
) -> None:
    model, batch = tiny_llama(attn_implementation=implementation), batches()[kind]
    stock = train(model, batch)
    stock_eval = model.eval()(**batch).logits
    stock_text = model.generate(batch["input_ids"], max_new_tokens=5, do_sample=False)
    model.train()
    handle = enable(model)
    assert (train(model, batch)[0] - stock[0]).abs() > 1e-6
    calls = handle.calls
    model.eval()
    assert torch.equal(model(**batch).logits, stock_eval)
    text = model.generate(batch["input_ids"], max_new_tokens=5, do_sample=False)
    assert torch.equal(text, stock_text)
    assert handle.calls == calls
    model.train()
    handle.remove()
    removed = train(model, batch)
    assert torch.equal(removed[0], stock[0])
    assert all(torch.equal(removed[1][name], stock[1][name]) for name in stock[1])


def test_cached_decoding_keeps_the_stock_path_even_in_training_mode(enable: Enable) -> None:
    model, ids = tiny_llama(), batches()["unpadded"]["input_ids"]
    handle = enable(model)
    with torch.no_grad():
        cache = model(ids[:, :40], use_cache=True).past_key_values
        calls = handle.calls
        model(ids[:, 40:41], past_key_values=cache)
        model(ids[:, 41:50], past_key_values=cache)
    assert handle.calls == calls


def test_an_inactive_handle_trains_with_full_attention_and_back(enable: Enable) -> None:
    model, batch = tiny_llama(), batches()["padded"]
    full = train(model, batch)
    handle = enable(model)
    sparse = train(model, batch)
    handle.active = False
    assert_same(train(model, batch), full)
    handle.active = True
    assert_same(train(model, batch), sparse)

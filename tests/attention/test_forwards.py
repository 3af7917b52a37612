"""Which forward passes are sparse: only those that train. Threads, interrupts, several models."""

from __future__ import annotations

import copy
import inspect
import threading
from typing import Any

import pytest
import tiny
import torch
from attention_material import Enable
from peft import LoraConfig, get_peft_model
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache, GenerationMixin

from longlora_plugin.attention import shifted_sparse_attention

GROUP, TOKENS = 8, 40


def tiny_llama(**config: Any) -> Any:
    return tiny.llama(weights=3.0, **config).double()


def packed(*lengths: int) -> torch.Tensor:
    """Positions [1, tokens] of documents."""
    return torch.cat([torch.arange(length) for length in lengths])[None]


IDS = torch.randint(97, (1, TOKENS), generator=torch.Generator().manual_seed(1))
BATCHES: dict[str, dict[str, torch.Tensor]] = {
    "plain": {"input_ids": IDS},
    "padded": {
        "input_ids": IDS.expand(2, -1),
        "attention_mask": torch.stack([torch.ones(TOKENS), torch.arange(TOKENS) < 29]).long(),
    },
    "packed": {"input_ids": IDS, "position_ids": packed(25, 15)},
}
KINDS = list(BATCHES)


# --- what trains -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_pass_without_gradients_in_training_mode_sees_what_one_with_them_sees(
    context: Any, kind: str, enable: Enable
) -> None:
    model, batch = tiny_llama(), BATCHES[kind]
    full = model(**batch).logits.detach()
    handle = enable(model)
    sparse = model(**batch).logits.detach()
    with context():
        assert torch.equal(model(**batch).logits, sparse)
    assert handle.calls == 4
    assert (sparse - full)[0].abs().max() > 1e-3
    with context():
        assert torch.equal(model.eval()(**batch).logits, full)
    assert handle.calls == 4


@pytest.mark.parametrize(
    "asked", [{"past_key_values": None}, {"use_cache": True}], ids=["a cache", "use_cache"]
)
def test_a_pass_that_fills_a_cache_is_full_even_with_gradients(
    asked: dict[str, Any], enable: Enable
) -> None:
    model = tiny_llama()
    full = model(IDS).logits
    handle = enable(model)
    if "past_key_values" in asked:
        asked = {"past_key_values": DynamicCache(config=model.config)}
    assert torch.equal(model(IDS, **asked).logits, full)
    assert handle.calls == 0


@pytest.mark.parametrize(
    "given", [{}, {"use_cache": False}, {"labels": IDS}, {"labels": IDS, "use_cache": True}]
)
def test_a_pass_for_a_loss_is_sparse_whatever_the_default_of_use_cache(
    given: dict[str, Any], enable: Enable
) -> None:
    model = tiny_llama()
    handle = enable(model)
    model(IDS, **given)
    assert handle.calls == 2


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_cache_that_checkpointing_drops_leaves_the_pass_sparse_and_exact(
    reentrant: bool, enable: Enable
) -> None:
    model = tiny_llama()
    handle = enable(model)
    model(IDS, labels=IDS).loss.backward()
    wanted = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model(IDS, use_cache=True).logits  # noqa: B018
    assert handle.calls == 4
    model(IDS, labels=IDS, use_cache=True).loss.backward()
    assert handle.calls == 8, "once forward and once when recomputing"
    for parameter, gradient in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-12, atol=1e-12)


def generated(model: Any, **options: Any) -> torch.Tensor:
    return model.generate(IDS, max_new_tokens=6, do_sample=False, **options)


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"num_beams": 2}], ids=str)
@pytest.mark.parametrize("wrapped", [False, True], ids=["alone", "in PEFT"])
def test_text_generated_in_training_mode_is_the_original_models(
    wrapped: bool, options: dict[str, Any], enable: Enable
) -> None:
    model: Any = tiny_llama()
    if wrapped:
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"])).double().train()
    scores = {"output_scores": True, "return_dict_in_generate": True}
    wanted = generated(model, **options, **scores)
    handle = enable(model)
    text = generated(model, **options, **scores)
    assert torch.equal(text.sequences, wanted.sequences)
    assert all(map(torch.equal, text.scores, wanted.scores))
    assert handle.calls == 0


def test_another_thread_trains_sparse_while_one_generates(enable: Enable) -> None:
    model = tiny_llama()
    handle = enable(model)
    seen: list[int] = []

    def train(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        before = handle.calls
        thread = threading.Thread(target=lambda: model(IDS))
        thread.start()
        thread.join()
        seen.append(handle.calls - before)
        return scores

    generated(model, logits_processor=[train], use_cache=False)
    assert seen == [2] * 6
    assert handle.calls == 12, "the generated tokens' own passes were sparse"


def test_generate_is_the_upstream_method_again_once_no_model_is_enabled(enable: Enable) -> None:
    upstream = GenerationMixin.__dict__["generate"]
    first, second = enable(tiny_llama()), enable(tiny_llama())
    assert GenerationMixin.__dict__["generate"] is not upstream
    assert inspect.signature(GenerationMixin.generate) == inspect.signature(upstream)
    first.remove()
    assert GenerationMixin.__dict__["generate"] is not upstream
    second.remove()
    second.remove()
    assert GenerationMixin.__dict__["generate"] is upstream


def test_a_pass_after_an_interrupted_generation_trains(enable: Enable) -> None:
    model = tiny_llama()
    handle = enable(model)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generated(model, logits_processor=[interrupt])
    model(IDS)
    assert handle.calls == 2


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_what_inference_mode_cached_is_still_good_for_training(backend: str) -> None:
    qkv = [torch.randn(1, 2, 37, 8) for _ in range(3)]
    options = {"group_size": 6, "cu_seqlens": torch.tensor([0, 17, 37]), "backend": backend}
    with torch.inference_mode():
        wanted = shifted_sparse_attention(*qkv, **options)
    query = qkv[0].clone().requires_grad_()
    out = shifted_sparse_attention(query, *qkv[1:], **options)
    out.sum().backward()
    assert torch.equal(out, wanted)


# --- one pass knows nothing of another -------------------------------------------------------


def test_positions_given_by_place_count_like_those_given_by_name(enable: Enable) -> None:
    model, padding = tiny_llama(), torch.ones_like(IDS)
    enable(model)
    named = model(IDS, attention_mask=padding, position_ids=packed(25, 15)).logits
    assert torch.equal(model(IDS, padding, packed(25, 15)).logits, named)
    assert (model(IDS, padding).logits - named).abs().max() > 1e-3


def test_threads_that_share_a_model_keep_their_own_documents(enable: Enable) -> None:
    model = tiny_llama()
    enable(model)
    cuts = [packed(a, TOKENS - a) for a in (3, 11, 20, 33)]
    batches = [{"input_ids": IDS, "position_ids": positions} for positions in cuts]
    padding = {"attention_mask": torch.ones_like(IDS)}  # then only the hook knows of positions
    batches += [batch | padding for batch in batches]
    wanted = [model(**batch).logits.detach() for batch in batches]
    wrong: list[int] = []

    def train(which: int) -> None:
        for _ in range(15):
            logits = model(**batches[which]).logits
            logits.sum().backward()
            if not torch.equal(logits.detach(), wanted[which]):
                wrong.append(which)

    threads = [threading.Thread(target=train, args=(which,)) for which in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("left_by", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("part", ["the model", "its decoder"])
def test_an_interrupted_pass_leaves_nothing_to_the_next(
    part: str, left_by: type[BaseException], enable: Enable
) -> None:
    model, padding = tiny_llama(), torch.ones_like(IDS)
    enable(model)
    run = model if part == "the model" else model.model
    wanted = run(IDS, attention_mask=padding)[0].detach()

    def interrupt(*_: Any) -> None:
        raise left_by

    hook = model.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(left_by):
        model(IDS, attention_mask=padding, position_ids=packed(25, 15))
    with pytest.raises(left_by), torch.no_grad():
        model(IDS, attention_mask=padding)
    hook.remove()
    assert torch.equal(run(IDS, attention_mask=padding)[0], wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_model_of_the_same_config_object_keeps_its_own_attention(
    kind: str, enable: Enable
) -> None:
    model, batch = tiny_llama(), BATCHES[kind]
    other = type(model)(model.config).double().train()
    full = other(**batch).logits
    handle = enable(model)
    assert torch.equal(other(**batch).logits, full)
    model(**batch)
    assert handle.calls == 2
    assert torch.equal(other(**batch).logits, full)


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_of_an_enabled_model_decides_by_its_own_mode(kind: str, enable: Enable) -> None:
    policy, batch = tiny_llama(), BATCHES[kind]
    full = policy(**batch).logits.detach()
    enable(policy)
    twin = copy.deepcopy(policy)
    sparse = policy(**batch).logits.detach()
    with torch.no_grad():
        assert torch.equal(twin(**batch).logits, sparse)
        assert torch.equal(twin.eval()(**batch).logits, full)
    assert (sparse - full)[0].abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_a_reference_model_in_evaluation_mode_runs_as_its_policy_does(
    kind: str, enable: Enable
) -> None:
    policy, reference, batch = tiny_llama(), tiny_llama().eval(), BATCHES[kind]
    full = policy(**batch).logits.detach()
    of_policy = enable(policy)
    of_reference = enable(reference, follows=of_policy)

    @torch.no_grad()
    def both() -> list[torch.Tensor]:
        return [model(**batch).logits for model in (policy, reference)]

    sparse = policy(**batch).logits.detach()
    assert (sparse - full)[0].abs().max() > 1e-3
    assert all(torch.equal(logits, sparse) for logits in both())
    policy.eval()
    assert all(torch.equal(logits, full) for logits in both())
    policy.train()
    of_policy.active = False
    assert all(torch.equal(logits, full) for logits in both())
    of_policy.active = True
    generated(reference)
    assert of_reference.calls == 2
    assert all(torch.equal(logits, sparse) for logits in both())


def test_among_several_models_all_but_the_policy_follow_it(enable: Enable) -> None:
    policy, reference = tiny_llama(), tiny_llama().eval()
    of_reference, of_policy = enable(reference), enable(policy)
    wrapped = get_peft_model(policy, LoraConfig(target_modules=["q_proj"]))
    for handle in (of_policy, of_reference):
        handle.follow(wrapped)
    assert of_policy.follows is None
    assert of_reference.follows is of_policy


# --- waits for the device ----------------------------------------------------------------------


class Waits(TorchFunctionMode):
    """Counts what makes Python wait for a GPU: values, or sizes that depend on values."""

    names = frozenset(
        ["item", "tolist", "cpu", "nonzero", "__bool__", "__int__", "equal", "unique", "numpy"]
    )

    def __init__(self) -> None:
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        masked = name == "__getitem__" and any(
            isinstance(x, torch.Tensor) and x.dtype == torch.bool
            for x in (args[1] if isinstance(args[1], tuple) else [args[1]])
        )
        out = func(*args, **(kwargs or {}))
        if name in self.names - {"numpy"} or masked:
            self.count += 1
        return out


@pytest.mark.parametrize(("kind", "allowed"), [("plain", 0), ("padded", 1), ("packed", 1)])
def test_a_pass_waits_once_for_its_documents_and_never_on_plain_rows(
    kind: str, allowed: int, enable: Enable
) -> None:
    model, batch = tiny_llama(), BATCHES[kind]
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with Waits() as without:
        model(**batch, use_cache=False).logits.sum().backward()
    enable(model)
    with Waits() as waits:
        model(**batch, use_cache=False).logits.sum().backward()
    # What the original model waits for by itself is not counted.
    assert waits.count - without.count <= allowed

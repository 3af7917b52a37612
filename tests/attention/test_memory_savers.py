"""Axolotl's keys that save memory leave the gradients of S²-Attn as they are: its own code, on a
tiny model. `activation_offloading: true` (TRL) and `layer_offloading` move tensors between a GPU
and the CPU, and run on a GPU only."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tiny
import torch

from longlora_plugin.attention import enable_shifted_attention

GPU = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="moves tensors between a GPU and the CPU"
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def llama() -> Any:
    model = tiny.llama(3).double().to(DEVICE)
    model.model.embed_tokens.requires_grad_(False)
    model.enable_input_require_grads()
    return model


def gradients(
    prepare: Callable[[Any], Any] = lambda model: None, *, checkpointing: bool = True
) -> dict[str, torch.Tensor]:
    """Gradients of one S² step; `prepare` may return a context to run it in."""
    model = llama()
    context = prepare(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    handle = enable_shifted_attention(model, group_size=16)
    ids = torch.randint(0, 97, (1, 70), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    with context or contextlib.nullcontext():
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert handle.calls >= 3
    handle.remove()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module")
def plain() -> dict[str, torch.Tensor]:
    return gradients(checkpointing=False)


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-12, rtol=1e-9)


@contextlib.contextmanager
def kept(owner: Any, *names: str) -> Iterator[None]:
    """Axolotl patches classes and tables for good; a test must not."""
    before = {name: owner.__dict__[name] for name in names}
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


@pytest.mark.parametrize("shards", [1, 3])
def test_tiled_mlp_leaves_the_gradients_alone(plain: dict[str, torch.Tensor], shards: int) -> None:
    pytest.importorskip("deepspeed")
    from axolotl.monkeypatch.tiled_mlp import patch_tiled_mlp
    from transformers.models.llama.modeling_llama import LlamaMLP

    with kept(LlamaMLP, "forward"):
        before = LlamaMLP.forward
        patch_tiled_mlp("llama", cfg_num_shards=shards)
        assert LlamaMLP.forward is not before
        assert_equal(gradients(), plain)


def test_chunked_cross_entropy_leaves_the_gradients_alone(
    plain: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    from axolotl.monkeypatch.loss.chunked import patch_chunked_ce_loss_fn
    from transformers.loss import loss_utils

    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    before = dict(loss_utils.LOSS_MAPPING)
    try:
        with kept(loss_utils, "ForCausalLMLoss"):
            patch_chunked_ce_loss_fn(4)
            assert loss_utils.LOSS_MAPPING["ForCausalLM"] is not before["ForCausalLM"]
            found = gradients()
    finally:
        loss_utils.LOSS_MAPPING.update(before)
    # Its loss is computed in fp32.
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, plain[name], atol=1e-7, rtol=1e-4)


def test_selective_checkpointing_leaves_the_gradients_alone(
    plain: dict[str, torch.Tensor],
) -> None:
    from axolotl.monkeypatch.selective_checkpointing import apply_selective_checkpointing

    assert_equal(gradients(apply_selective_checkpointing), plain)


def test_offloaded_hidden_states_leave_the_gradients_alone(plain: dict[str, torch.Tensor]) -> None:
    from axolotl.monkeypatch import checkpoint_activation_offload as offload
    from transformers import GradientCheckpointingLayer

    contexts = []

    def prepare(model: Any) -> Any:
        contexts.append(offload.get_checkpoint_hidden_states_offloading_ctx_manager())
        return contexts[0]

    with kept(GradientCheckpointingLayer, "__call__"):
        try:
            assert_equal(gradients(prepare), plain)
        finally:
            offload._ORIG_GRADIENT_CHECKPOINTING_LAYER_CALL = None


@GPU
@pytest.mark.gpu
def test_activation_offloading_leaves_the_gradients_alone(plain: dict[str, torch.Tensor]) -> None:
    from axolotl.core.trainers.mixins.activation_checkpointing import (
        get_lora_act_offloading_ctx_manager,
    )

    assert_equal(gradients(get_lora_act_offloading_ctx_manager, checkpointing=False), plain)


@GPU
@pytest.mark.gpu
def test_layer_offloading_leaves_the_gradients_alone(plain: dict[str, torch.Tensor]) -> None:
    from axolotl.core.trainers.mixins.layer_offloading import (
        LayerOffloadManager,
        _LayerOffloadContext,
    )

    def prepare(model: Any) -> Any:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("norm" in name)
        manager = LayerOffloadManager(model)
        manager.setup_hooks()
        return _LayerOffloadContext(manager)

    found = gradients(prepare)
    assert_equal(found, {name: plain[name] for name in found})

"""S²-Attn together with everything else that changes how a model trains.

Not testable on a CPU, and why:

- Liger's kernels: Triton finds no driver ("0 active drivers"). What Liger does to the model, a
  replaced forward, is tested; its kernels are element-wise or the loss and never see attention.
- Cut Cross Entropy is not installed here and needs Triton too; it replaces the loss as Liger does.
- Axolotl's `activation_offloading` moves tensors to "cuda" by name; its checkpoint function is
  tested with that name read as "cpu".
- Axolotl's `lora_*_kernel`: the kernels need CUDA, the attention forward they patch is tested.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_material import (
    KINDS,
    TOKENS,
    Enable,
    assert_same,
    batches,
    gradients,
    loss_of,
    tiny_llama,
    train,
)
from peft import LoraConfig, get_peft_model
from transformers import modeling_utils
from transformers.integrations.neftune import activate_neftune, deactivate_neftune
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

# --- rows of every kind --------------------------------------------------------------------------


def alone(batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Documents [1, tokens] of a batch, each without the padding or the others around it."""
    if "position_ids" in batch:
        starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
        ends = [*starts[1:], TOKENS]
        return [batch["input_ids"][:, a:b] for a, b in zip(starts, ends, strict=True)]
    return [ids[m.bool()][None] for ids, m in zip(*batch.values(), strict=True)]


@pytest.mark.parametrize("kind", ["padded", "padded left", "packed"])
@pytest.mark.parametrize("below", [0, 30])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_packed_or_padded_rows_train_like_their_documents_one_by_one(
    implementation: str, below: int, kind: str, enable: Enable
) -> None:
    batch = batches()[kind]
    model = tiny_llama(attn_implementation=implementation)
    handle = enable(model, full_attention_below=below)
    logits = model(**batch, use_cache=False).logits
    if "attention_mask" in batch:
        logits = logits[batch["attention_mask"].bool()]
    logits.square().sum().backward()
    together = (logits.detach().reshape(-1, 97), gradients(model))
    pieces = [model(input_ids=ids, use_cache=False).logits[0] for ids in alone(batch)]
    torch.cat(pieces).square().sum().backward()
    # After padding on the left positions differ, and RoPE's angles are fp32 in any model.
    tolerance = 1e-6 if kind == "padded left" else 1e-12
    assert_same(together, (torch.cat(pieces).detach(), gradients(model)), tolerance)
    assert handle.calls == 2 * (1 + len(pieces))


# --- checkpointing and offloading ----------------------------------------------------------------


def checkpointed(model: Any, reentrant: bool) -> Any:
    model = copy.deepcopy(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    return model


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_changes_no_gradient(
    kind: str, reentrant: bool, enable: Enable
) -> None:
    model, batch = tiny_llama(), batches()[kind]
    handle = enable(model)
    wanted = train(model, batch)
    assert handle.calls == 2
    handle.remove()
    assert (train(model, batch)[0] - wanted[0]).abs() > 1e-6, "full attention gives another loss"
    model = checkpointed(model, reentrant)
    handle = enable(model)
    assert_same(train(model, batch), wanted)
    assert handle.calls == 4, "once forward and once when recomputing"


@pytest.mark.parametrize("reentrant", [True, False])
def test_two_forwards_before_one_backward_recompute_each_its_own_documents(
    reentrant: bool, enable: Enable
) -> None:
    model = tiny_llama()
    enable(model)
    parts = [train(model, batches()[kind]) for kind in KINDS]
    wanted = (
        sum(loss for loss, _ in parts),
        {name: sum(part[name] for _, part in parts) for name in parts[0][1]},
    )
    model = checkpointed(model, reentrant)
    loss = sum(loss_of(model, batches()[kind]) for kind in KINDS)
    loss.backward()
    assert_same((loss.detach(), gradients(model)), wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_activations_kept_on_the_cpu_change_no_gradient(kind: str, enable: Enable) -> None:
    model, batch = tiny_llama(), batches()[kind]
    enable(model)
    wanted = train(model, batch)
    with torch.autograd.graph.save_on_cpu():
        loss = loss_of(model, batch)
    loss.backward()
    assert_same((loss.detach(), gradients(model)), wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_axolotls_offloading_checkpoint_changes_no_gradient(
    kind: str, enable: Enable, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("axolotl")
    from axolotl.monkeypatch.gradient_checkpointing import hf_grad_checkpoint_offload_wrapper

    model, batch = tiny_llama(), batches()[kind]
    enable(model)
    wanted = train(model, batch)
    move = torch.Tensor.to

    def to_cpu_for_cuda(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return move(x, *("cpu" if arg == "cuda" else arg for arg in args), **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", to_cpu_for_cuda)
    monkeypatch.setattr(modeling_utils, "checkpoint", hf_grad_checkpoint_offload_wrapper)
    assert_same(train(checkpointed(model, True), batch), wanted)


# --- other patches of the model ------------------------------------------------------------------


@pytest.fixture
def compiler() -> Iterator[Callable[[Any], Any]]:
    """torch.compile with aot_eager: all that dynamo and autograd do, without inductor's wait."""
    torch._dynamo.reset()
    yield lambda model: torch.compile(model, backend="aot_eager")
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["unpadded", "padded"])
def test_torch_compile_changes_no_gradient(
    kind: str, enable: Enable, compiler: Callable[[Any], Any]
) -> None:
    model, batch = tiny_llama(1), batches()[kind]
    handle = enable(model)
    wanted = train(model, batch)
    loss = loss_of(compiler(model), batch)
    loss.backward()
    assert_same((loss.detach(), gradients(model)), wanted)
    assert handle.calls == 2


@pytest.mark.filterwarnings("ignore")
def test_torch_compile_compiles_nothing_anew_for_other_packed_documents(
    enable: Enable, compiler: Callable[[Any], Any]
) -> None:
    model, batch = tiny_llama(1), batches()["packed"]
    handle = enable(model)
    compiled = compiler(model)
    graphs = []
    for lengths in ([25, 1, 34], [60], [7, 20, 33], [30, 10, 10, 10]):
        positions = torch.cat([torch.arange(n) for n in lengths])[None]
        batch = {"input_ids": batch["input_ids"], "position_ids": positions}
        wanted = train(model, batch)
        loss = loss_of(compiled, batch)
        loss.backward()
        assert_same((loss.detach(), gradients(model)), wanted)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert handle.calls == 8
    assert graphs[0] > 0
    assert graphs == [graphs[0]] * 4


@pytest.fixture
def lora_kernel_forward(tmp_path: Path) -> Iterator[None]:
    """Axolotl's `lora_qkv_kernel` and `lora_o_kernel` patch of Llama's attention forward."""
    pytest.importorskip("axolotl")
    from axolotl.monkeypatch import lora_kernels
    from axolotl.utils.dict import DictDefault

    stock = modeling_llama.LlamaAttention.forward
    tiny_llama().config.save_pretrained(tmp_path)
    lora_kernels.patch_self_attn_lora(DictDefault({"base_model": str(tmp_path)}))
    assert modeling_llama.LlamaAttention.forward is not stock
    yield
    modeling_llama.LlamaAttention.forward = stock
    del modeling_llama.LlamaAttention._original_forward


@pytest.mark.parametrize("kind", KINDS)
def test_axolotls_lora_kernel_forward_still_runs_shifted_attention(
    kind: str, enable: Enable, lora_kernel_forward: None
) -> None:
    pytest.importorskip("axolotl")
    from axolotl.monkeypatch import lora_kernels

    model, batch = tiny_llama(), batches()[kind]
    for layer in model.model.layers:
        attention = layer.self_attn
        attention.apply_qkv = types.MethodType(lora_kernels.original_apply_qkv, attention)
        attention.apply_o = types.MethodType(lora_kernels.original_apply_o, attention)
    full = train(model, batch)
    handle = enable(model)
    assert handle.layers == 2
    patched = train(model, batch)
    assert handle.calls == 2
    handle.remove()
    assert_same(train(model, batch), full)
    modeling_llama.LlamaAttention.forward = modeling_llama_forward
    handle = enable(model)
    assert_same(train(model, batch), patched)


modeling_llama_forward = modeling_llama.LlamaAttention.forward


@pytest.mark.parametrize("patched_first", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_axolotls_sdpa_varlen_patch_keeps_shifted_attention_and_survives_its_removal(
    kind: str, patched_first: bool, enable: Enable
) -> None:
    pytest.importorskip("axolotl")
    from axolotl.monkeypatch.attention.sdpa_varlen import patch_sdpa_varlen, unpatch_sdpa_varlen

    model, batch = tiny_llama(), batches()[kind]
    handle = enable(model)
    wanted = train(model, batch)
    handle.remove()
    full = train(model, batch)
    stock_mask = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
    try:
        if patched_first:
            assert patch_sdpa_varlen()
            handle = enable(model)
        else:
            handle = enable(model)
            assert patch_sdpa_varlen()
        theirs = ALL_ATTENTION_FUNCTIONS._global_mapping["sdpa"]
        assert_same(train(model, batch), wanted)
        assert handle.calls == 2
        handle.remove()
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is theirs
        assert_same(train(model, batch), full)
    finally:
        unpatch_sdpa_varlen()
        # Their unpatching registers what was in force when they patched; second, that was ours.
        ALL_MASK_ATTENTION_FUNCTIONS.register("sdpa", stock_mask)


def test_ligers_replaced_forward_still_runs_shifted_attention(enable: Enable) -> None:
    liger = pytest.importorskip("liger_kernel.transformers", exc_type=ImportError)
    model, batch = tiny_llama(), batches()["padded"]
    handle = enable(model)
    wanted = train(model, batch)
    stock = type(model).forward
    liger.apply_liger_kernel_to_llama(
        rope=False,
        cross_entropy=False,
        rms_norm=False,
        swiglu=False,
        fused_linear_cross_entropy=True,
        model=model,
    )
    assert model.forward.__func__ is not stock
    assert_same(train(model, batch), wanted)
    assert handle.calls == 4


@pytest.mark.gpu
def test_ligers_kernels_beside_shifted_attention(enable: Enable) -> None:
    if not torch.cuda.is_available():
        pytest.skip("Liger's kernels need Triton with a GPU driver")
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    model = tiny_llama(dtype=torch.float32).cuda()
    batch = {name: x.cuda() for name, x in batches()["padded"].items()}
    enable(model)
    wanted = train(model, batch)
    apply_liger_kernel_to_llama(model=model)
    assert_same(train(model, batch), wanted, tolerance=1e-3)


def test_neftune_noise_goes_through_shifted_attention(enable: Enable) -> None:
    model, batch = tiny_llama(), batches()["padded"]
    handle = enable(model)
    clean = model(**batch).logits
    hook = activate_neftune(model, 5.0)
    torch.manual_seed(1)
    noisy = model(**batch).logits
    torch.manual_seed(1)
    embeddings = model.get_input_embeddings()(batch["input_ids"])
    deactivate_neftune(model, hook, accelerator=_unwrapping())
    wanted = model(inputs_embeds=embeddings, attention_mask=batch["attention_mask"]).logits
    assert handle.calls == 6
    assert (noisy - clean).abs().max() > 1e-3
    torch.testing.assert_close(noisy, wanted, rtol=1e-12, atol=1e-12)


def _unwrapping() -> Any:
    return types.SimpleNamespace(unwrap_model=lambda model: model)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("wrapped_first", [True, False])
def test_lora_and_dora_train_with_shifted_attention_whichever_comes_first(
    wrapped_first: bool, dora: bool, enable: Enable
) -> None:
    model, batch = tiny_llama(), batches()["packed"]
    handle = enable(model)
    wanted = loss_of(model, batch).detach()
    handle.remove()
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj", "o_proj"], use_dora=dora)
    if wrapped_first:
        adapted = get_peft_model(model, config).double()
        handle = enable(adapted)
    else:
        handle = enable(model)
        adapted = get_peft_model(model, config).double()
    assert handle.layers == 2
    loss, grads = train(adapted, batch)
    # A fresh adapter adds nothing, so the loss is the base model's.
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=1e-12)
    assert handle.calls == 2
    trained = {name for name, gradient in grads.items() if gradient.abs().max() > 0}
    assert {name for name in grads if "lora_B" in name} <= trained
    assert all("lora" in name for name in grads)
    handle.remove()
    merged = adapted.merge_and_unload().eval()
    torch.testing.assert_close(
        merged(**batch).logits, tiny_llama().eval()(**batch).logits, rtol=1e-12, atol=1e-12
    )

"""S²-Attn beside everything else that changes how a model trains, and what it costs in memory.

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
import gc
import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM, modeling_utils
from transformers.integrations import flex_attention as hf_flex
from transformers.integrations.neftune import activate_neftune, deactivate_neftune
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

from longlora_plugin.attention import enable_shifted_attention, varlen
from longlora_plugin.attention.install import ShiftedAttention

GROUP = 16
TOKENS = 60


def tiny_llama(layers: int = 2, dtype: torch.dtype = torch.float64, **config: Any) -> Any:
    torch.manual_seed(0)
    settings = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "attn_implementation": "sdpa",
    }
    return LlamaForCausalLM(LlamaConfig(**(settings | config))).to(dtype).train()


def batches() -> dict[str, dict[str, torch.Tensor]]:
    ids = torch.randint(97, (2, TOKENS), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, 41:] = 0
    positions = torch.cat([torch.arange(25), torch.arange(1), torch.arange(34)])[None]
    return {
        "unpadded": {"input_ids": ids},
        "padded": {"input_ids": ids, "attention_mask": mask},
        "packed": {"input_ids": ids[:1], "position_ids": positions},
    }


KINDS = list(batches())


def loss_of(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    logits = model(**batch, use_cache=False).logits
    if "attention_mask" in batch:
        logits = logits * batch["attention_mask"][..., None]
    return logits.square().mean()


def gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    assert found
    return found


def train(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, Any]]:
    loss = loss_of(model, batch)
    loss.backward()
    return loss.detach(), gradients(model)


def assert_same(one: tuple[Any, Any], other: tuple[Any, Any], tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(one[0], other[0], rtol=tolerance, atol=tolerance)
    assert one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        torch.testing.assert_close(
            gradient, other[1][name], rtol=tolerance, atol=tolerance, msg=f"gradient of {name}"
        )


def registries() -> list[dict[str, Any]]:
    found = [
        dict(mapping)
        for registry in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS)
        for mapping in (registry._global_mapping, registry._local_mapping)
    ]
    return [*found, {"instance": sorted(vars(ALL_ATTENTION_FUNCTIONS))}]


@pytest.fixture(autouse=True)
def registries_are_restored() -> Iterator[None]:
    """Every test of this file leaves transformers as it found it."""
    before = registries()
    yield
    assert registries() == before


@pytest.fixture
def enabled() -> Iterator[Callable[..., ShiftedAttention]]:
    """`enable_shifted_attention` whose handles are removed after the test."""
    handles: list[ShiftedAttention] = []

    def enable(model: Any, **options: Any) -> ShiftedAttention:
        handles.append(enable_shifted_attention(model, **({"group_size": GROUP} | options)))
        return handles[-1]

    yield enable
    for handle in handles:
        handle.remove()


Enable = Callable[..., ShiftedAttention]


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
    implementation: str, below: int, kind: str, enabled: Enable
) -> None:
    batch = batches()[kind.removesuffix(" left")]
    if kind == "padded left":
        batch["attention_mask"] = batch["attention_mask"].flip(1)
    model = tiny_llama(attn_implementation=implementation)
    handle = enabled(model, full_attention_below=below)
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
    kind: str, reentrant: bool, enabled: Enable
) -> None:
    model, batch = tiny_llama(), batches()[kind]
    handle = enabled(model)
    wanted = train(model, batch)
    assert handle.calls == 2
    handle.remove()
    assert (train(model, batch)[0] - wanted[0]).abs() > 1e-6, "full attention gives another loss"
    model = checkpointed(model, reentrant)
    handle = enabled(model)
    assert_same(train(model, batch), wanted)
    assert handle.calls == 4, "once forward and once when recomputing"


@pytest.mark.parametrize("reentrant", [True, False])
def test_two_forwards_before_one_backward_recompute_each_its_own_documents(
    reentrant: bool, enabled: Enable
) -> None:
    model = tiny_llama()
    enabled(model)
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
def test_activations_kept_on_the_cpu_change_no_gradient(kind: str, enabled: Enable) -> None:
    model, batch = tiny_llama(), batches()[kind]
    enabled(model)
    wanted = train(model, batch)
    with torch.autograd.graph.save_on_cpu():
        loss = loss_of(model, batch)
    loss.backward()
    assert_same((loss.detach(), gradients(model)), wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_axolotls_offloading_checkpoint_changes_no_gradient(
    kind: str, enabled: Enable, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("axolotl")
    from axolotl.monkeypatch.gradient_checkpointing import hf_grad_checkpoint_offload_wrapper

    model, batch = tiny_llama(), batches()[kind]
    enabled(model)
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
    kind: str, enabled: Enable, compiler: Callable[[Any], Any]
) -> None:
    model, batch = tiny_llama(1), batches()[kind]
    handle = enabled(model)
    wanted = train(model, batch)
    loss = loss_of(compiler(model), batch)
    loss.backward()
    assert_same((loss.detach(), gradients(model)), wanted)
    assert handle.calls == 2


@pytest.mark.filterwarnings("ignore")
def test_torch_compile_compiles_nothing_anew_for_other_packed_documents(
    enabled: Enable, compiler: Callable[[Any], Any]
) -> None:
    model, batch = tiny_llama(1), batches()["packed"]
    handle = enabled(model)
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
    kind: str, enabled: Enable, lora_kernel_forward: None
) -> None:
    pytest.importorskip("axolotl")
    from axolotl.monkeypatch import lora_kernels

    model, batch = tiny_llama(), batches()[kind]
    for layer in model.model.layers:
        attention = layer.self_attn
        attention.apply_qkv = types.MethodType(lora_kernels.original_apply_qkv, attention)
        attention.apply_o = types.MethodType(lora_kernels.original_apply_o, attention)
    full = train(model, batch)
    handle = enabled(model)
    assert handle.layers == 2
    patched = train(model, batch)
    assert handle.calls == 2
    handle.remove()
    assert_same(train(model, batch), full)
    modeling_llama.LlamaAttention.forward = modeling_llama_forward
    handle = enabled(model)
    assert_same(train(model, batch), patched)


modeling_llama_forward = modeling_llama.LlamaAttention.forward


@pytest.mark.parametrize("patched_first", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_axolotls_sdpa_varlen_patch_keeps_shifted_attention_and_survives_its_removal(
    kind: str, patched_first: bool, enabled: Enable
) -> None:
    pytest.importorskip("axolotl")
    from axolotl.monkeypatch.attention.sdpa_varlen import patch_sdpa_varlen, unpatch_sdpa_varlen

    model, batch = tiny_llama(), batches()[kind]
    handle = enabled(model)
    wanted = train(model, batch)
    handle.remove()
    full = train(model, batch)
    stock_mask = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
    try:
        if patched_first:
            assert patch_sdpa_varlen()
            handle = enabled(model)
        else:
            handle = enabled(model)
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


def test_ligers_replaced_forward_still_runs_shifted_attention(enabled: Enable) -> None:
    liger = pytest.importorskip("liger_kernel.transformers", exc_type=ImportError)
    model, batch = tiny_llama(), batches()["padded"]
    handle = enabled(model)
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
def test_ligers_kernels_beside_shifted_attention(enabled: Enable) -> None:
    if not torch.cuda.is_available():
        pytest.skip("Liger's kernels need Triton with a GPU driver")
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    model = tiny_llama(dtype=torch.float32).cuda()
    batch = {name: x.cuda() for name, x in batches()["padded"].items()}
    enabled(model)
    wanted = train(model, batch)
    apply_liger_kernel_to_llama(model=model)
    assert_same(train(model, batch), wanted, tolerance=1e-3)


def test_neftune_noise_goes_through_shifted_attention(enabled: Enable) -> None:
    model, batch = tiny_llama(), batches()["padded"]
    handle = enabled(model)
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
    wrapped_first: bool, dora: bool, enabled: Enable
) -> None:
    model, batch = tiny_llama(), batches()["packed"]
    handle = enabled(model)
    wanted = loss_of(model, batch).detach()
    handle.remove()
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj", "o_proj"], use_dora=dora)
    if wrapped_first:
        adapted = get_peft_model(model, config).double()
        handle = enabled(adapted)
    else:
        handle = enabled(model)
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


# --- copies, several models, removal -------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_deep_copy_trains_with_shifted_attention_until_the_handle_is_removed(
    kind: str, enabled: Enable
) -> None:
    model, batch = tiny_llama(), batches()[kind]
    full = train(model, batch)
    handle = enabled(model)
    wanted = train(model, batch)
    twin = copy.deepcopy(copy.deepcopy(model))
    assert_same(train(twin, batch), wanted)
    handle.remove()
    assert_same(train(twin, batch), full)
    handle = enabled(twin)  # nothing of the old handle is left on it
    assert_same(train(twin, batch), wanted)
    assert_same(train(model, batch), full)


def test_a_deep_copy_that_is_gone_is_not_kept_alive(enabled: Enable) -> None:
    model = tiny_llama()
    handle = enabled(model)
    twin = copy.deepcopy(model)
    assert len(handle._copies) == 2
    del twin
    gc.collect()
    assert len(handle._copies) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_two_models_keep_their_own_groups_and_a_third_its_full_attention(
    kind: str, enabled: Enable
) -> None:
    batch = batches()[kind]
    alone = []
    for group_size in (8, 24):
        model = tiny_llama()
        handle = enabled(model, group_size=group_size)
        alone.append(train(model, batch))
        handle.remove()
    full = train(tiny_llama(), batch)
    small, large, untouched = tiny_llama(), tiny_llama(), tiny_llama()
    handles = [enabled(small, group_size=8), enabled(large, group_size=24)]
    assert_same(train(small, batch), alone[0])
    assert_same(train(large, batch), alone[1])
    assert_same(train(untouched, batch), full)
    handles[0].remove()
    assert_same(train(small, batch), full)
    assert_same(train(large, batch), alone[1])


def test_enabling_twice_is_refused_and_the_first_stays(enabled: Enable) -> None:
    model = tiny_llama()
    handle = enabled(model)
    with pytest.raises(ValueError, match=r"already enabled on this model; remove\(\) it first"):
        enable_shifted_attention(model, group_size=8)
    train(model, batches()["padded"])
    assert handle.calls == 2


def test_removing_twice_is_harmless_even_beside_another_model(enabled: Enable) -> None:
    before = registries()
    one, other = tiny_llama(), tiny_llama()
    first, second = enabled(one), enabled(other)
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
    kind: str, implementation: str, enabled: Enable
) -> None:
    model, batch = tiny_llama(attn_implementation=implementation), batches()[kind]
    stock = train(model, batch)
    stock_eval = model.eval()(**batch).logits
    stock_text = model.generate(batch["input_ids"], max_new_tokens=5, do_sample=False)
    model.train()
    handle = enabled(model)
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


def test_cached_decoding_keeps_the_stock_path_even_in_training_mode(enabled: Enable) -> None:
    model, ids = tiny_llama(), batches()["unpadded"]["input_ids"]
    handle = enabled(model)
    with torch.no_grad():
        cache = model(ids[:, :40], use_cache=True).past_key_values
        calls = handle.calls
        model(ids[:, 40:41], past_key_values=cache)
        model(ids[:, 41:50], past_key_values=cache)
    assert handle.calls == calls


def test_an_inactive_handle_trains_with_full_attention_and_back(enabled: Enable) -> None:
    model, batch = tiny_llama(), batches()["padded"]
    full = train(model, batch)
    handle = enabled(model)
    sparse = train(model, batch)
    handle.active = False
    assert_same(train(model, batch), full)
    handle.active = True
    assert_same(train(model, batch), sparse)


# --- memory --------------------------------------------------------------------------------------

LONG = 16384


class LargestTensor(TorchDispatchMode):
    """The most elements of any tensor that an operation returns, forward and backward."""

    elements = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return out


def long_batches() -> dict[str, dict[str, torch.Tensor]]:
    ids = torch.randint(64, (2, LONG), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, 10_000:] = 0
    mask[0, :77] = 0
    documents = [5000, 1, 700, 8192, LONG - 13893]
    positions = torch.cat([torch.arange(n) for n in documents])[None]
    return {
        "unpadded": {"input_ids": ids},
        "padded": {"input_ids": ids, "attention_mask": mask},
        "packed": {"input_ids": ids[:1], "position_ids": positions},
    }


def long_model() -> Any:
    return tiny_llama(1, torch.float32, hidden_size=64, intermediate_size=128, vocab_size=64)


def peak_bytes(step: Callable[[], None]) -> int:
    """Most bytes held at once during `step` over what was there before, from the allocator."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step()
    events = profile.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize("kind", ["padded", "packed"])
def test_16k_tokens_take_under_200_mib_a_row_and_make_no_square_tensor(
    kind: str, enabled: Enable
) -> None:
    batch, model = long_batches()[kind], long_model()
    handle = enabled(model, group_size=LONG // 4)
    rows = len(batch["input_ids"])
    largest = LargestTensor()

    def step() -> None:
        with largest:
            loss_of(model, batch).backward()

    peak = peak_bytes(step)
    assert handle.calls == 1
    assert 0 < largest.elements < LONG * LONG // 16
    assert peak / rows < 200 * 2**20, f"{peak / rows / 2**20:.0f} MiB a row"


@pytest.mark.parametrize("kind", ["padded", "packed"])
def test_the_stock_path_makes_the_square_tensor_that_the_memory_test_looks_for(kind: str) -> None:
    """The measuring itself: without S², transformers builds an N × N mask for these rows."""
    batch = {name: x[:, :4096] for name, x in long_batches()[kind].items()}
    if kind == "padded":
        batch["attention_mask"][1, 3000:] = 0
    with LargestTensor() as largest, torch.no_grad():
        long_model()(**batch, use_cache=False)
    if kind == "packed":
        batch["position_ids"][0, 2000:] -= 2000
        with LargestTensor() as largest, torch.no_grad():
            long_model()(**batch, use_cache=False)
    assert largest.elements >= 4096 * 4096


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flex_attention"])
@pytest.mark.parametrize("kind", ["unpadded", "padded", "packed"])
def test_the_way_to_other_kernels_makes_no_square_tensor(
    kind: str, implementation: str, enabled: Enable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels themselves are replaced by one that returns its queries."""
    taken: list[torch.Size] = []

    def flash(q: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        taken.append(q.shape)
        return q.clone()

    from transformers.integrations import flash_attention

    monkeypatch.setattr(flash_attention, "_flash_attention_forward", flash)
    monkeypatch.setattr(hf_flex, "compile_friendly_flex_attention", flash)
    batch, model = long_batches()[kind], long_model()
    model.config._attn_implementation = implementation
    enabled(model, group_size=LONG // 4)
    autocast: AbstractContextManager[Any] = (
        torch.autocast("cpu", torch.bfloat16) if "flash" in implementation else nullcontext()
    )
    with LargestTensor() as largest, autocast:
        loss_of(model, batch).backward()
    assert len(taken) == 2
    assert 0 < largest.elements < LONG * LONG // 16


def test_index_tensors_of_varlen_are_made_once_for_all_layers(
    enabled: Enable, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.integrations import flash_attention

    boundaries = []

    def flash(q: torch.Tensor, *_: Any, **kwargs: Any) -> torch.Tensor:
        boundaries.append(kwargs["cu_seq_lens_q"])
        return q.clone()

    monkeypatch.setattr(flash_attention, "_flash_attention_forward", flash)
    varlen._cuts.cache_clear()
    model = tiny_llama(3, torch.bfloat16)
    model.config._attn_implementation = "flash_attention_2"
    enabled(model)
    model(**batches()["padded"], use_cache=False)
    assert len(boundaries) == 6
    assert len({id(x) for x in boundaries}) == 2

"""Memory: what a real step holds, and what each saving saves."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_material import LLAMA_SAVED, plain_shape, speed_up, tiny_llama
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from longlora_plugin.attention import enable_shifted_attention
from longlora_plugin.plan.flops import forward_flops
from longlora_plugin.plan.memory import NF4_BYTES, OPTIMIZERS, Training, memory, saved_by_layer
from longlora_plugin.plan.parameters import Parameters, count_parameters
from longlora_plugin.plan.shape import ModelShape, meta_model, shape_of


def test_nf4_takes_the_bytes_bitsandbytes_takes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(1024, 1024)
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    held = sum(
        tensor.numel() * tensor.element_size()
        for tensor in (packed, state.absmax, state.state2.absmax)
    )
    assert held / weight.numel() == NF4_BYTES
    assert pytest.approx(4.127, abs=0.001) == 8 * NF4_BYTES


def test_a_quantized_base_shrinks_its_linear_layers_only(
    shape_7b: ModelShape, llama_7b: Any
) -> None:
    counts = count_parameters(llama_7b, lora_r=8, target_modules=["q_proj"])
    linear = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert counts.quantizable == linear
    adapter = 4 * counts.lora
    rest = 2 * (counts.base - linear)
    plain, nf4, int8 = (
        memory(shape_7b, counts, Training(8192, quantization=kind)).weights - adapter
        for kind in (None, "nf4", "int8")
    )
    assert plain == 2 * counts.base
    assert nf4 == pytest.approx(rest + linear * 0.515869, rel=1e-6)
    assert int8 == rest + linear + 4 * 32 * (4 * 4096 + 2 * 11008 + 4096)


class LiveTensors(TorchDispatchMode):
    """Bytes of all tensors that operations have made and that are still alive, and their peak."""

    def __init__(self, known: Any) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.sizes = {tensor.untyped_storage()._cdata: 0 for tensor in known}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self.sizes:
                    self.sizes[key] = storage.nbytes()
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._free, key)
        return out

    def _free(self, key: int) -> None:
        self.now -= self.sizes.pop(key, 0)


def peak_of_a_step(
    config: Any, length: int, *, adapter: bool, checkpointing: bool, group_size: int | None = None
) -> int:
    """Peak bytes of activations of a bf16 training step; weights and gradients are not in it."""
    from peft import LoraConfig, get_peft_model

    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(torch.bfloat16)
    if adapter:
        lora = LoraConfig(
            r=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
            modules_to_save=LLAMA_SAVED,
        )  # fmt: skip
        model = get_peft_model(model, lora, autocast_adapter_dtype=False)
        model.enable_input_require_grads()
    if checkpointing:
        model.gradient_checkpointing_enable()
    handle = enable_shifted_attention(model, group_size=group_size) if group_size else None
    model.train()
    known = [*model.parameters(), *model.buffers()]
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
            known.append(parameter.grad)
    tokens = torch.randint(0, config.vocab_size, (1, length))
    with LiveTensors(known) as live:
        model(input_ids=tokens, labels=tokens, use_cache=False)["loss"].backward()
    if handle:
        handle.remove()
    return live.peak


@pytest.mark.parametrize("adapter", [True, False], ids=["adapter", "full"])
@pytest.mark.parametrize("checkpointing", [True, False], ids=["checkpointing", "kept"])
@pytest.mark.parametrize("vocab", [64, 4000], ids=["layer-bound", "loss-bound"])
@pytest.mark.parametrize("group_size", [None, 128], ids=["full-attention", "s2"])
def test_activations_are_those_a_real_step_holds(
    adapter: bool, checkpointing: bool, vocab: int, group_size: int | None
) -> None:
    config = tiny_llama(
        vocab_size=vocab, hidden_size=128, intermediate_size=352, num_hidden_layers=4
    )
    length = 512
    measured = peak_of_a_step(
        config, length, adapter=adapter, checkpointing=checkpointing, group_size=group_size
    )
    model = meta_model(config)
    lora = {"lora_r": 8, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
    counts = count_parameters(model, **(lora if adapter else {}))
    training = Training(length, checkpointing=checkpointing, shifted_copies=group_size is not None)
    plan = memory(shape_of(model), counts, training)
    assert plan.activations + plan.loss + plan.layer == pytest.approx(measured, rel=0.03)


PARAMETERS = Parameters(
    base=13_000_000, lora=200_000, copies=500_000, trained_base=0, quantizable=12_000_000,
    quantizable_rows=20_000, largest_matrix=700_000, largest_unit=3_000_000,
    outside_layers=1_000_000,
)  # fmt: skip
FULL = Parameters(
    base=13_000_000, lora=0, copies=0, trained_base=13_000_000, quantizable=12_000_000,
    quantizable_rows=20_000, largest_matrix=700_000, largest_unit=3_000_000,
    outside_layers=1_000_000,
)  # fmt: skip
runs = st.builds(
    Training,
    sequence_len=st.integers(1, 200_000),
    micro_batch_size=st.integers(1, 8),
    gpus=st.integers(1, 64),
    compute_bytes=st.sampled_from([2, 4]),
    quantization=st.sampled_from([None, "nf4", "int8"]),
    checkpointing=st.booleans(),
    optimizer=st.sampled_from(sorted(OPTIMIZERS)),
    engine=st.sampled_from(["ddp", "deepspeed", "fsdp"]),
    loss=st.sampled_from(["full", "chunked", "fused"]),
    dense_mask=st.booleans(),
    shifted_copies=st.booleans(),
)


@settings(deadline=None, max_examples=100)
@given(run=runs, more=st.integers(1, 10_000), counts=st.sampled_from([PARAMETERS, FULL]))
def test_a_longer_row_never_costs_less(run: Training, more: int, counts: Parameters) -> None:
    shape = plain_shape()
    values = vars(run)
    longer = Training(**{**values, "sequence_len": run.sequence_len + more})
    assert memory(shape, counts, longer).total >= memory(shape, counts, run).total
    assert memory(shape, counts, longer).needed >= memory(shape, counts, run).needed
    for causal in (True, False):
        short = forward_flops(shape, run.sequence_len, 512, causal=causal)
        long = forward_flops(shape, longer.sequence_len, 512, causal=causal)
        assert long.total > short.total


@settings(deadline=None, max_examples=100)
@given(length=st.integers(2, 100_000), share=st.floats(0.01, 1), kv=st.sampled_from([1, 2, 8]))
def test_s2_never_costs_more_than_full_attention(length: int, share: float, kv: int) -> None:
    shape = plain_shape(kv_heads=kv)
    group = max(2, int(length * share) // 2 * 2)
    for causal in (True, False):
        full = forward_flops(shape, length, causal=causal)
        sparse = forward_flops(shape, length, group, causal=causal)
        assert sparse.attention <= full.attention
        assert (sparse.projections, sparse.ffn, sparse.others) == (
            full.projections, full.ffn, full.others,
        )  # fmt: skip
    assert speed_up(shape, length, group) >= 1


@settings(deadline=None, max_examples=100)
@given(run=runs, counts=st.sampled_from([PARAMETERS, FULL]))
def test_each_zero_stage_holds_no_more_than_the_one_before(
    run: Training, counts: Parameters
) -> None:
    held = []
    for stage in (0, 1, 2, 3):
        values = {**vars(run), "engine": "deepspeed", "zero_stage": stage}
        plan = memory(plain_shape(), counts, Training(**values))
        # In whole bytes: the parts are floats, whose sums differ in the last bit.
        held.append(round(plan.total - plan.buffers))
    assert held == sorted(held, reverse=True)


def test_zero_3_of_a_large_model_is_smaller_than_zero_2_with_all_its_buffers(
    shape_7b: ModelShape, llama_7b: Any
) -> None:
    counts = count_parameters(llama_7b)
    totals = [
        memory(shape_7b, counts, Training(8192, gpus=8, engine="deepspeed", zero_stage=stage)).total
        for stage in (0, 1, 2, 3)
    ]
    assert totals == sorted(totals, reverse=True)


@settings(deadline=None, max_examples=50)
@given(run=runs)
def test_the_parts_add_up_and_needed_leaves_out_fragments(run: Training) -> None:
    gib = memory(plain_shape(), PARAMETERS, run).gib()
    total, needed = gib.pop("total"), gib.pop("needed")
    assert sum(gib.values()) == pytest.approx(total)
    assert needed == pytest.approx(total - gib["fragments"])
    assert min(gib.values()) >= 0


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"checkpointing": True}, "activations"),
        ({"offload_activations": True}, "activations"),
        ({"loss": "fused"}, "loss"),
        ({"loss": "chunked"}, "loss"),
        ({"optimizer": "adamw_8bit"}, "optimizer"),
        ({"optimizer": "lion"}, "optimizer"),
        ({"quantization": "nf4"}, "weights"),
        ({"offload_optimizer": True}, "optimizer"),
        ({"offload_weights": True}, "weights"),
    ],
)
def test_what_saves_memory_saves_it_where_it_should(change: dict[str, Any], part: str) -> None:
    base = Training(8192, checkpointing=False)
    before = memory(plain_shape(), PARAMETERS, base)
    after = memory(plain_shape(), PARAMETERS, Training(**{**vars(base), **change}))
    assert getattr(after, part) < getattr(before, part)
    assert after.total < before.total


def test_stored_scores_of_eager_attention_grow_with_the_square(shape_7b: ModelShape) -> None:
    def layer(length: int) -> float:
        run = Training(length, scores_width=length, loss="fused")
        return memory(shape_7b, PARAMETERS, run).layer

    assert 3.5 < layer(32768) / layer(16384) < 4.0
    assert saved_by_layer(shape_7b, adapter=True) < saved_by_layer(shape_7b, adapter=False)

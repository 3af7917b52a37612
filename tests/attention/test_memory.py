"""What S²-Attn costs in memory: no tensor grows with the square of the row."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from attention_material import Enable, attend, batches, loss_of, random_qkv, tiny_llama
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.integrations import flex_attention as hf_flex

from longlora_plugin.attention import packing, varlen

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
    kind: str, enable: Enable
) -> None:
    batch, model = long_batches()[kind], long_model()
    handle = enable(model, group_size=LONG // 4)
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
    kind: str, implementation: str, enable: Enable, monkeypatch: pytest.MonkeyPatch
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
    enable(model, group_size=LONG // 4)
    autocast: AbstractContextManager[Any] = (
        torch.autocast("cpu", torch.bfloat16) if "flash" in implementation else nullcontext()
    )
    with LargestTensor() as largest, autocast:
        loss_of(model, batch).backward()
    assert len(taken) == 2
    assert 0 < largest.elements < LONG * LONG // 16


def test_index_tensors_of_varlen_are_made_once_for_all_layers(
    enable: Enable, monkeypatch: pytest.MonkeyPatch
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
    enable(model)
    model(**batches()["padded"], use_cache=False)
    assert len(boundaries) == 6
    assert len({id(x) for x in boundaries}) == 2


ADDS_INTO_ZEROS = {
    *("slice_backward", "select_backward", "index_select_backward"),
    *("index_add", "index_add_", "index_put", "index_put_", "_index_put_impl_"),
}


class Operations(TorchDispatchMode):
    """Names of the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("implementation", ["sdpa", "flash_attention_2"])
@pytest.mark.parametrize("kind", ["plain", "packed", "padded"])
def test_gradients_of_split_heads_and_gathered_rows_are_copies_not_sums_over_zeros(
    kind: str, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kernel(_: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *__: Any) -> torch.Tensor:
        return q * (k.sum() + v.sum())

    monkeypatch.setattr(varlen, "_flash_kernel", kernel)
    ids = torch.tensor([[0] * 20 + [1] * 17, [2] * 9 + [-1 if kind == "padded" else 3] * 28])
    documents = None if kind == "plain" else packing.from_ids(ids, None, batch=2, length=37)
    qkv = random_qkv(37, batch=2)
    out = attend(implementation, qkv, 8, documents)
    with Operations() as operations:
        out.sum().backward()
    assert all(x.grad is not None for x in qkv)
    assert not operations.names & ADDS_INTO_ZEROS

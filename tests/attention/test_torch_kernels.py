"""S²-Attn on PyTorch's varlen kernel, and on its fused ones where heads are grouped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import dense_attention
import pytest
import torch
from attention_material import assert_gradients_near, assert_near, attend, in_float64, random_qkv
from flash_stand_in import FlashLibrary

from longlora_plugin.attention import S2, backends, packing, sdpa, shifted_sparse_attention, varlen
from longlora_plugin.attention.call import AttentionCall
from longlora_plugin.attention.layout import head_runs


def torch_stand_in(library: FlashLibrary, takes: frozenset[str]) -> Callable[..., torch.Tensor]:
    def varlen_attn(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, **options: Any
    ) -> torch.Tensor:
        assert options.keys() <= takes
        assert options.get("window_size") == (-1, 0) or options.get("is_causal") is True
        assert query.shape[1] == key.shape[1] or options["enable_gqa"]
        cu = (cu_seq_q, cu_seq_k, max_q, max_k)
        return library.varlen(
            query, key, value, *cu, scale=options.get("scale"), causal=True, softcap=None
        )

    return varlen_attn


TORCH_2_10, TORCH_2_13 = {"is_causal"}, {"window_size", "scale", "enable_gqa"}


@pytest.mark.parametrize("takes", [TORCH_2_10, TORCH_2_13], ids=["torch 2.10", "torch 2.13"])
@pytest.mark.parametrize("heads", [(4, 2), (3, 1), (3, 3), (1, 1)])
@pytest.mark.parametrize("v_head_dim", [8, 4])
@pytest.mark.parametrize("padded", [False, True])
def test_packed_and_padded_rows_are_one_call_of_torchs_varlen_kernel_a_run_of_heads(
    padded: bool,
    v_head_dim: int,
    heads: tuple[int, int],
    takes: set[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch_varlen = pytest.importorskip("torch.nn.attention.varlen", reason="needs torch 2.10")
    library = FlashLibrary()
    monkeypatch.setattr(torch_varlen, "varlen_attn", torch_stand_in(library, frozenset(takes)))
    monkeypatch.setattr(varlen, "_parameters_of_torch_varlen", lambda: frozenset(takes))
    monkeypatch.setattr(backends, "torch_varlen_serves", lambda *_: True)
    ids = torch.tensor([[0] * 20 + [1] + [2] * 16, [3] * 9 + [-1] * 28 if padded else [4] * 37])
    qkv = random_qkv(37, *heads, batch=2, v_head_dim=v_head_dim)
    scale = None if takes == TORCH_2_10 else 0.3
    # Without an argument for it, the scale is that of the heads as the kernel gets them.
    documents = packing.from_ids(ids, None, batch=2, length=37)
    out = attend("sdpa", qkv, 8, documents, scale=scale)
    assert len(library.calls) == len(head_runs(S2, *heads, 8))
    mask = torch.stack([dense_attention.masks(row, 8, *heads) for row in ids])
    doubles = in_float64(qkv)
    real = (ids >= 0)[:, None, :, None]
    expected = dense_attention.attention(*doubles, mask, scale=scale)
    assert_near(out * real, expected, 1e-2)
    assert not (out * ~real).any()
    assert_gradients_near((out, qkv), (expected, doubles), 2e-2, where=real)


CPU, GPU = torch.device("cpu"), torch.device("cuda")


@dataclass
class OnGPU:
    """What the choice of a kernel asks of a tensor."""

    dtype: torch.dtype = torch.bfloat16
    shape: tuple[int, ...] = (1, 4, 100, 64)
    device: torch.device = GPU


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (9, 0)])
@pytest.mark.parametrize(
    ("tensor", "options", "served"),
    [
        (OnGPU(), {}, True),
        (OnGPU(torch.float16), {"softcap": 3.0}, True),  # sdpa knows no softcap either
        (OnGPU(torch.float32), {}, False),
        (OnGPU(shape=(1, 4, 100, 288)), {}, False),
        (OnGPU(shape=(1, 4, 100, 20)), {}, False),
        (OnGPU(), {"dropout": 0.1}, False),
        (OnGPU(), {"sinks_H": torch.zeros(4)}, False),
        (OnGPU(device=CPU), {}, False),
    ],
)
def test_torchs_varlen_kernel_serves_16_bits_since_ampere_without_options(
    tensor: OnGPU,
    options: dict[str, Any],
    served: bool,
    capability: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("torch.nn.attention.varlen", reason="needs torch 2.10")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    call = AttentionCall(packing.whole_rows(1, 100), (), 8, **options)
    wanted = served and capability >= (8, 0)
    assert varlen.torch_varlen_serves(tensor, tensor, call) is wanted


# --- grouped heads where no fused kernel takes them ----------------------------------------------


@pytest.mark.parametrize("capability", [(7, 5), (8, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_heads_have_a_fused_kernel_in_16_bits_since_ampere_only(
    dtype: torch.dtype, capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    fused = sdpa.has_fused_grouped_heads(OnGPU(dtype))
    assert fused == (dtype == torch.bfloat16 and capability >= (8, 0))
    assert not sdpa.has_fused_grouped_heads(OnGPU(shape=(1, 4, 100, 512)))


@pytest.mark.parametrize("heads", [(4, 2), (3, 1), (6, 2)])
@pytest.mark.parametrize("cuts", [None, (0, 13, 37)])
def test_repeated_keys_and_values_equal_grouped_heads_in_values_and_gradients(
    cuts: tuple[int, ...] | None, heads: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    fused, grouped = torch.nn.functional.scaled_dot_product_attention, []

    def record(*args: Any, enable_gqa: bool, **kwargs: Any) -> torch.Tensor:
        grouped.append(enable_gqa)
        return fused(*args, enable_gqa=enable_gqa, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", record)
    qkv = random_qkv(37, *heads, dtype=torch.float64)
    options = {"group_size": 8, "cu_seqlens": None if cuts is None else torch.tensor(cuts)}
    wanted = shifted_sparse_attention(*qkv, **options)
    assert any(grouped)
    grouped.clear()
    monkeypatch.setattr(sdpa, "has_fused_grouped_heads", lambda _: False)
    out = shifted_sparse_attention(*qkv, **options)
    assert not any(grouped)
    assert_near(out, wanted, 1e-12)
    assert_gradients_near((out, qkv), (wanted, qkv), 1e-12)

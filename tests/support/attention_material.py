"""Tiny models, batches and comparisons that the tests of attention share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tiny
import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from longlora_plugin.attention import S2, ShiftedAttention, packing
from longlora_plugin.attention.backends import backend_for
from longlora_plugin.attention.call import AttentionCall
from longlora_plugin.attention.layout import head_runs

GROUP, TOKENS = 8, 60
"""Tokens of the groups of `enable`, and of the rows of `batches`."""
KINDS = ["unpadded", "padded", "packed"]
"""Batches of every kind; `batches` has two more."""
Enable = Callable[..., ShiftedAttention]
"""What the fixture `enable` is."""

# --- tensors -------------------------------------------------------------------------------------


def random_qkv(
    length: int,
    heads: int = 4,
    kv_heads: int = 2,
    *,
    batch: int = 1,
    v_head_dim: int = 8,
    dtype: torch.dtype = torch.bfloat16,
) -> list[torch.Tensor]:
    """Random queries [B, H, N, 8], keys and values, with the strides of attention modules."""
    generator = torch.Generator().manual_seed(length)
    return [
        torch.randn(batch, length, h, d, generator=generator)
        .to(dtype)
        .transpose(1, 2)
        .requires_grad_()
        for h, d in ((heads, 8), (kv_heads, 8), (kv_heads, v_head_dim))
    ]


def in_float64(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    return [x.detach().cpu().double().requires_grad_() for x in inputs]


def one_document_and_several(length: int) -> list[tuple[int, ...] | None]:
    """Boundaries of a row: none, and some."""
    return [None, tuple(sorted({0, length // 3, length // 3 + 1, length}))]


def attend(
    backend: str,
    inputs: list[torch.Tensor],
    group_size: int,
    documents: packing.Documents | None = None,
    **options: Any,
) -> torch.Tensor:
    """One call of a back end with what `AttentionCall` takes, [B, H, N, D]."""
    batch, heads, length, _ = inputs[0].shape
    call = AttentionCall(
        documents=documents or packing.whole_rows(batch, length),
        runs=head_runs(S2, heads, inputs[1].shape[1], group_size),
        group_size=group_size,
        **options,
    )
    return backend_for(backend)(*inputs, call).transpose(1, 2)


def assert_near(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Largest error over the largest expected value (at least 1)."""
    assert actual.shape == expected.shape
    error = (actual.double() - expected.double()).abs().max().item()
    size = max(1.0, expected.abs().max().item())
    assert error <= tolerance * size, f"error {error:.3g}, values up to {size:.3g}"


def assert_gradients_near(
    one: tuple[torch.Tensor, list[torch.Tensor]],
    other: tuple[torch.Tensor, list[torch.Tensor]],
    tolerance: float,
    where: torch.Tensor | None = None,
) -> None:
    """Gradients of two outputs to their inputs, for the same random weights (0 outside `where`)."""
    (out, inputs), (expected, same_inputs) = one, other
    towards = torch.randn(out.shape).to(out.dtype)
    if where is not None:
        towards = towards * where
    for gradient, wanted in zip(
        torch.autograd.grad(out, inputs, towards.to(out.device)),
        torch.autograd.grad(expected, same_inputs, towards.to(expected.dtype)),
        strict=True,
    ):
        assert_near(gradient.cpu(), wanted, tolerance)


# --- models --------------------------------------------------------------------------------------


def tiny_llama(layers: int = 2, dtype: torch.dtype = torch.float64, **config: Any) -> Any:
    return tiny.llama(layers, **config).to(dtype)


def batches() -> dict[str, dict[str, torch.Tensor]]:
    ids = torch.randint(97, (2, TOKENS), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, 41:] = 0
    positions = torch.cat([torch.arange(25), torch.arange(1), torch.arange(34)])[None]
    row = {"input_ids": ids[:1], "position_ids": positions}
    cu = torch.tensor([0, 25, 26, TOKENS], dtype=torch.int32)
    return {
        "unpadded": {"input_ids": ids},
        "padded": {"input_ids": ids, "attention_mask": mask},
        "packed": row,
        "padded left": {"input_ids": ids, "attention_mask": mask.flip(1)},
        # What Axolotl's and transformers' flattening collators pass besides.
        "packed by cu_seq_lens": row
        | {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": 34, "max_length_k": 34},
    }


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
    """Loss and gradients."""
    loss = loss_of(model, batch)
    loss.backward()
    return loss.detach(), gradients(model)


def logits_and_gradients(
    model: Any, batch: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """In fp32, of real tokens."""
    logits = model(**batch, use_cache=False).logits.float()
    real = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    logits = logits * real[..., None]
    (logits.square().sum() / real.sum()).backward()
    return logits.detach(), list(gradients(model).values())


def assert_same(one: tuple[Any, Any], other: tuple[Any, Any], tolerance: float = 1e-12) -> None:
    """What `train` returned, twice."""
    torch.testing.assert_close(one[0], other[0], rtol=tolerance, atol=tolerance)
    assert one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        torch.testing.assert_close(
            gradient, other[1][name], rtol=tolerance, atol=tolerance, msg=f"gradient of {name}"
        )


def registries() -> list[dict[str, Any]]:
    """Everything that transformers knows of attention and mask functions."""
    found = [
        dict(mapping)
        for registry in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS)
        for mapping in (registry._global_mapping, registry._local_mapping)
    ]
    return [*found, {"instance": sorted(vars(ALL_ATTENTION_FUNCTIONS))}]

"""Cases of S²-Attn on tensors: shapes, strides, documents, and what the definition says of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import dense_attention
import torch
from attention_material import assert_near
from hypothesis import strategies as st

from longlora_plugin.attention import shifted_sparse_attention

DENSE = ("sdpa", "eager")


DENSE = ("sdpa", "eager")
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}
ROUNDING = torch.finfo(torch.bfloat16).eps / 2
"""Largest relative error of rounding to bf16, 2⁻⁸."""


def strided(shape: tuple[int, ...], layout: str, generator: torch.Generator) -> torch.Tensor:
    """float64 [B, heads, N, D] with the strides that attention modules produce, and others."""
    batch, heads, length, head_dim = shape
    if layout == "BHND":
        return torch.randn(shape, generator=generator, dtype=torch.float64)
    if layout == "BNHD":
        x = torch.randn(batch, length, heads, head_dim, generator=generator, dtype=torch.float64)
        return x.transpose(1, 2)
    if layout == "part of a fused projection":
        x = torch.randn(
            batch, length, heads, 2 * head_dim + 1, generator=generator, dtype=torch.float64
        )
        return x.transpose(1, 2)[..., head_dim:-1]
    x = torch.randn(1, 1, length, head_dim, generator=generator, dtype=torch.float64)
    return x.expand(shape)


@dataclass(frozen=True)
class Case:
    length: int
    group_size: int
    heads: int = 4
    kv_heads: int = 2
    batch: int = 1
    cuts: tuple[int, ...] | None = None
    below: int = 0
    head_dim: int = 8
    v_head_dim: int = 8
    scale: float | None = None
    dtype: torch.dtype = torch.float64
    layout: str = "BHND"
    seed: int = 0

    def inputs(self) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        sizes = ((self.heads, self.head_dim), (self.kv_heads, self.head_dim))
        return [
            strided((self.batch, heads, self.length, size), self.layout, generator)
            .to(self.dtype)
            .requires_grad_()
            for heads, size in (*sizes, (self.kv_heads, self.v_head_dim))
        ]

    @property
    def document_ids(self) -> torch.Tensor:
        lengths = torch.tensor(self.cuts or (0, self.length)).diff()
        return torch.arange(len(lengths)).repeat_interleave(lengths)

    @property
    def mask(self) -> torch.Tensor:
        """bool [H, N, N]."""
        return dense_attention.masks(
            self.document_ids, self.group_size, self.heads, self.kv_heads, self.below
        )

    def run(self, inputs: list[torch.Tensor], backend: str) -> torch.Tensor:
        cu_seqlens = None if self.cuts is None else torch.tensor(self.cuts, dtype=torch.int32)
        return shifted_sparse_attention(
            *inputs,
            group_size=self.group_size,
            scale=self.scale,
            cu_seqlens=cu_seqlens,
            full_attention_below=self.below,
            backend=backend,
        )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    group_size = 2 * draw(st.integers(1, 75))
    near_a_cut = st.builds(
        lambda halves, off: halves * group_size // 2 + off, st.integers(1, 8), st.integers(-1, 1)
    )
    length = min(300, max(1, draw(st.one_of(st.integers(1, 300), near_a_cut))))
    kv_heads = draw(st.integers(1, 5))
    heads = kv_heads * draw(st.integers(1, 5 if kv_heads == 1 else 3))
    cuts = None
    if draw(st.booleans()):
        inner = draw(st.lists(st.integers(0, length), max_size=6))
        cuts = (0, *sorted(inner), length)
    head_dim = draw(st.integers(1, 12))
    return Case(
        length=length,
        group_size=group_size,
        heads=heads,
        kv_heads=kv_heads,
        batch=1 if cuts else draw(st.integers(1, 3)),
        cuts=cuts,
        below=draw(st.one_of(st.just(0), st.integers(0, length))),
        head_dim=head_dim,
        v_head_dim=draw(st.one_of(st.just(head_dim), st.integers(1, 12))),
        scale=draw(st.sampled_from([None, 0.05, 0.7])),
        dtype=draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16])),
        layout=draw(
            st.sampled_from(["BHND", "BNHD", "part of a fused projection", "one row for all"])
        ),
        seed=draw(st.integers(0, 2**16)),
    )


def values_and_gradients(
    attention: Callable[..., torch.Tensor], inputs: list[torch.Tensor]
) -> list[torch.Tensor]:
    """The output, and the gradients of a fixed weighted sum of it."""
    out = attention(*inputs)
    towards = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    # The same weights in every dtype.
    return [out, *torch.autograd.grad(out, inputs, towards.bfloat16().to(out.dtype))]


def assert_equals_definition(case: Case, backend: str) -> None:
    inputs = case.inputs()
    kept = [x.detach().clone() for x in inputs]
    ours = values_and_gradients(lambda *qkv: case.run(list(qkv), backend), inputs)
    assert ours[0].dtype == case.dtype
    for x, before in zip(inputs, kept, strict=True):
        assert torch.equal(x.detach(), before), "an input was written to"

    def dense(dtype: torch.dtype) -> list[torch.Tensor]:
        copies = [x.detach().to(dtype).requires_grad_() for x in inputs]
        attend = partial(dense_attention.attention, mask=case.mask, scale=case.scale, dtype=dtype)
        return values_and_gradients(attend, copies)

    wanted = dense(torch.float64)
    if case.dtype != torch.bfloat16:
        for ours_, wanted_ in zip(ours, wanted, strict=True):
            assert_near(ours_, wanted_, TOLERANCE[case.dtype])
        return
    # As FlashAttention is tested: no more than twice the error of dense attention in bf16, and,
    # where that is exact by luck, what a few roundings of the largest value come to.
    for ours_, wanted_, rounded in zip(ours, wanted, dense(torch.bfloat16), strict=True):
        largest = max(1.0, wanted_.abs().max().item())
        bound = 2 * (rounded.double() - wanted_).abs().max().item() + 4 * ROUNDING * largest
        error = (ours_.double() - wanted_).abs().max().item()
        assert error <= bound, f"error {error:.3g}, bound {bound:.3g}, values up to {largest:.3g}"

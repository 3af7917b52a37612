"""S²-Attn on tensors against its definition: values, gradients, who sees whom, padding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import dense_attention
import pytest
import reference
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from transformers import masking_utils

from longlora_plugin import hookspecs, registry
from longlora_plugin.attention import S2, AttentionPattern, packing, shifted_sparse_attention
from longlora_plugin.attention.backends import backend_for
from longlora_plugin.attention.call import AttentionCall
from longlora_plugin.attention.layout import ends, head_runs, segments

THOROUGH = settings(max_examples=250, deadline=None)
DENSE = ("sdpa", "eager")
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}
ROUNDING = torch.finfo(torch.bfloat16).eps / 2
"""Largest relative error of rounding to bf16, 2⁻⁸."""


def assert_near(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Largest error over the largest expected value (at least 1)."""
    assert actual.shape == expected.shape
    error = (actual.double() - expected.double()).abs().max().item()
    size = max(1.0, expected.abs().max().item())
    assert error <= tolerance * size, f"error {error:.3g}, values up to {size:.3g}"


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


# --- the oracle ------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [(1, 1), (3, 1), (4, 2), (5, 5), (6, 3)])
@pytest.mark.parametrize(("lengths", "below"), [([17], 0), ([5, 1, 9], 0), ([5, 1, 9], 5)])
def test_dense_oracle_equals_the_definition(
    heads: tuple[int, int], lengths: list[int], below: int
) -> None:
    ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    mask = dense_attention.masks(ids, 4, *heads, below)
    assert torch.equal(mask, reference.head_masks(lengths, 4, *heads, below))
    n_heads, kv_heads = heads
    query = torch.randn(2, n_heads, sum(lengths), 5, dtype=torch.float64)
    key, value = torch.randn(2, 2, kv_heads, sum(lengths), 5, dtype=torch.float64)
    for more in ({}, {"softcap": 2.0, "sinks": torch.randn(n_heads), "scale": 0.3}):
        wanted = reference.reference_attention(
            query,
            key,
            value,
            group_size=4,
            document_lengths=lengths,
            full_attention_below=below,
            **more,
        )
        assert_near(dense_attention.attention(query, key, value, mask, **more), wanted, 1e-13)


# --- values and gradients --------------------------------------------------------------------


@THOROUGH
@given(case=cases(), backend=st.sampled_from(DENSE))
def test_any_shape_equals_the_definition_in_values_and_gradients(case: Case, backend: str) -> None:
    event(f"{backend} {case.dtype}")
    assert_equals_definition(case, backend)


G = 8
BOUNDARIES = sorted({n for k in range(1, 9) for n in (k * G // 2 - 1, k * G // 2, k * G // 2 + 1)})


@pytest.mark.parametrize("backend", DENSE)
@pytest.mark.parametrize("length", BOUNDARIES)
def test_lengths_around_every_cut_equal_the_definition(length: int, backend: str) -> None:
    case = Case(length=length, group_size=G, batch=2)
    assert_equals_definition(case, backend)
    packed = replace(case, batch=1, length=length + 5, cuts=(0, length, length + 5))
    assert_equals_definition(packed, backend)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_softcap_and_sinks_equal_the_definition(data: st.DataObject) -> None:
    case = replace(data.draw(cases()), dtype=torch.float64)
    softcap = data.draw(st.sampled_from([None, 0.5, 5.0]))
    sinks = torch.randn(case.heads, dtype=torch.float64, requires_grad=True)
    inputs = case.inputs()
    documents = (
        packing.whole_rows(case.batch, case.length)
        if case.cuts is None
        else packing.from_boundaries(torch.tensor(case.cuts), case.length)
    )
    out = backend_for("eager")(
        *inputs,
        AttentionCall(
            documents=documents,
            runs=head_runs(S2, case.heads, case.kv_heads, case.group_size),
            group_size=case.group_size,
            full_attention_below=case.below,
            scale=case.scale,
            softcap=softcap,
            sinks_H=sinks,
        ),
    ).transpose(1, 2)
    expected = dense_attention.attention(
        *inputs, case.mask, scale=case.scale, softcap=softcap, sinks=sinks
    )
    assert_near(out, expected, 1e-11)
    towards = torch.randn_like(out)
    for gradient, wanted in zip(
        torch.autograd.grad(out, [*inputs, sinks], towards),
        torch.autograd.grad(expected, [*inputs, sinks], towards),
        strict=True,
    ):
        assert_near(gradient, wanted, 1e-11)


def test_sinks_on_sdpa_are_refused_with_the_back_ends_that_have_them() -> None:
    x = torch.randn(1, 2, 4, 8)
    with pytest.raises(ValueError, match="eager, flash_attention_3 or flex_attention"):
        backend_for("sdpa")(
            x,
            x,
            x,
            AttentionCall(
                documents=packing.whole_rows(1, 4),
                runs=head_runs(S2, 2, 2, 2),
                group_size=2,
                full_attention_below=0,
                sinks_H=torch.zeros(2),
            ),
        )


def test_dropout_drops_weights_and_keeps_their_mean() -> None:
    torch.manual_seed(0)
    query, key = torch.zeros(2, 64, 4, 16, 8)
    value = torch.ones(64, 4, 16, 8)
    for backend in DENSE:
        out = backend_for(backend)(
            query,
            key,
            value,
            AttentionCall(
                documents=packing.whole_rows(64, 16),
                runs=head_runs(S2, 4, 4, 8),
                group_size=8,
                full_attention_below=0,
                dropout=0.3,
            ),
        )
        assert out.std() > 0.1
        assert abs(out.mean() - 1) < 0.05


# --- who sees whom ---------------------------------------------------------------------------


@pytest.mark.parametrize("backend", DENSE)
@pytest.mark.parametrize("heads", [(1, 1), (3, 1), (4, 2), (3, 3), (5, 5), (6, 2)])
@pytest.mark.parametrize("cuts", [None, (0, 13, 14, 14, 21, 37)])
@pytest.mark.parametrize("length", [3, 4, 8, 20, 37])
def test_weights_are_positive_exactly_where_the_definition_allows(
    length: int, cuts: tuple[int, ...] | None, heads: tuple[int, int], backend: str
) -> None:
    if cuts is not None:
        cuts = (*[cut for cut in cuts if cut < length], length)
    n_heads, kv_heads = heads
    case = Case(
        length=length, group_size=8, heads=n_heads, kv_heads=kv_heads, cuts=cuts, v_head_dim=length
    )
    query, key, value = case.inputs()
    # With one-hot values the output is the matrix of attention weights.
    one_hot = torch.eye(length, dtype=value.dtype).expand_as(value)
    weights = case.run([query, key, one_hot], backend)[0]
    assert torch.equal(weights > 0, case.mask)


@pytest.mark.parametrize("backend", DENSE)
@pytest.mark.parametrize("cuts", [None, (0, 11, 23)])
def test_gradients_reach_no_later_token_and_no_other_document(
    cuts: tuple[int, ...] | None, backend: str
) -> None:
    case = Case(length=23, group_size=6, cuts=cuts)
    inputs = case.inputs()
    out = case.run(inputs, backend)
    seen = case.mask.any(0)
    for token in range(case.length):
        for gradient in torch.autograd.grad(out[:, :, token].sum(), inputs[1:], retain_graph=True):
            reached = gradient.abs().sum((0, 1, 3)) > 0
            assert not (reached & ~seen[token]).any()
    # Nothing is trivially zero: the last value is reached from its own row.
    assert torch.autograd.grad(out[:, :, -1].sum(), inputs[2])[0][:, :, -1].abs().min() > 0


@pytest.mark.parametrize("backend", DENSE)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_changing_later_tokens_or_other_documents_changes_nothing(
    data: st.DataObject, backend: str
) -> None:
    case = replace(data.draw(cases()), dtype=torch.float64, layout="BHND")
    token = data.draw(st.integers(0, case.length - 1))
    before = [x.detach() for x in case.inputs()]
    elsewhere = (torch.arange(case.length) > token) | (
        case.document_ids != case.document_ids[token]
    )
    after = [x.clone() for x in before]
    for x in after:
        x[:, :, elsewhere] = 100 * torch.randn_like(x[:, :, elsewhere])
    out, changed = case.run(before, backend), case.run(after, backend)
    assert torch.equal(out[:, :, token], changed[:, :, token])


@pytest.mark.parametrize("backend", DENSE)
def test_a_longer_row_does_not_regroup_the_tokens_before(backend: str) -> None:
    case = Case(length=61, group_size=10)
    whole = case.run(case.inputs(), backend)
    for length in (1, 4, 5, 9, 10, 33, 60):
        start = replace(case, length=length).run([x[:, :, :length] for x in case.inputs()], backend)
        assert_near(start, whole[:, :, :length], 1e-12)


@pytest.mark.parametrize("backend", DENSE)
def test_packed_documents_equal_each_document_alone_in_values_and_gradients(backend: str) -> None:
    case = Case(length=97, group_size=12, cuts=(0, 40, 41, 41, 60, 97), below=19)
    packed_inputs, alone_inputs = case.inputs(), case.inputs()
    packed = case.run(packed_inputs, backend)
    pieces = [
        replace(case, length=last - first, cuts=None).run(
            [x[:, :, first:last] for x in alone_inputs], backend
        )
        for first, last in [(0, 40), (40, 41), (41, 60), (60, 97)]
    ]
    alone = torch.cat(pieces, 2)
    assert_near(packed, alone, 1e-12)
    towards = torch.randn_like(packed)
    for a, b in zip(
        torch.autograd.grad(packed, packed_inputs, towards),
        torch.autograd.grad(alone, alone_inputs, towards),
        strict=True,
    ):
        assert_near(a, b, 1e-12)


def test_a_document_up_to_full_attention_below_is_plain_causal_attention() -> None:
    case = Case(length=40, group_size=6)
    inputs = case.inputs()
    full = torch.nn.functional.scaled_dot_product_attention(
        *inputs, is_causal=True, enable_gqa=True
    )
    assert_near(replace(case, below=40).run(inputs, "sdpa"), full, 1e-12)
    assert (replace(case, below=39).run(inputs, "sdpa") - full).abs().max() > 0.1


# --- padding ---------------------------------------------------------------------------------


@st.composite
def padded_batches(draw: st.DrawFn) -> torch.Tensor:
    """int64 [B, N] document ids: padding left, right, between, in holes; rows of all kinds."""
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 120))
    rows = []
    for _ in range(batch):
        left, right = draw(st.integers(0, length // 2)), draw(st.integers(0, length // 2))
        cuts = draw(st.lists(st.integers(0, length), max_size=3))
        ids = (torch.arange(length)[:, None] >= torch.tensor(sorted(cuts)).long()).sum(1)
        ids[:left] = -1
        ids[length - right :] = -1
        hole = draw(st.integers(0, length))
        if draw(st.booleans()):
            ids[hole : hole + draw(st.integers(1, 9))] = -1
        rows.append(ids)
    return torch.stack(rows)


def run_on_ids(
    ids: torch.Tensor,
    inputs: list[torch.Tensor],
    *,
    backend: str,
    group_size: int,
    positions: torch.Tensor | None = None,
    below: int = 0,
) -> torch.Tensor:
    batch, length = ids.shape
    return backend_for(backend)(
        *inputs,
        AttentionCall(
            documents=packing.from_ids(ids, positions, batch=batch, length=length),
            runs=head_runs(S2, inputs[0].shape[1], inputs[1].shape[1], group_size),
            group_size=group_size,
            full_attention_below=below,
        ),
    ).transpose(1, 2)


@settings(max_examples=80, deadline=None)
@given(
    ids=padded_batches(),
    half_group=st.integers(1, 40),
    below=st.sampled_from([0, 0, 10, 60]),
    backend=st.sampled_from(DENSE),
)
def test_padding_anywhere_leaves_real_tokens_as_the_definition_says(
    ids: torch.Tensor, half_group: int, below: int, backend: str
) -> None:
    batch, length = ids.shape
    case = Case(length=length, group_size=2 * half_group, batch=batch, layout="BNHD")
    inputs = case.inputs()
    mask = torch.stack([dense_attention.masks(row, 2 * half_group, 4, 2, below) for row in ids])
    expected = dense_attention.attention(*inputs, mask)
    out = run_on_ids(ids, inputs, backend=backend, group_size=2 * half_group, below=below)
    real = (ids >= 0)[:, None, :, None]
    assert_near(out * real, expected, 1e-11)
    if real.any():
        assert not (out * ~real).any(), "padding must come out as zero"
    towards = torch.randn_like(out) * real
    for gradient, wanted in zip(
        torch.autograd.grad(out, inputs, towards),
        torch.autograd.grad(expected, inputs, towards),
        strict=True,
    ):
        assert_near(gradient, wanted, 1e-11)


@pytest.mark.parametrize("backend", DENSE)
def test_values_in_padding_never_reach_real_tokens_even_if_they_are_nan(backend: str) -> None:
    ids = torch.tensor([[0] * 9 + [-1] * 11, [-1] * 6 + [0] * 14, [0] * 20])
    inputs = [x.detach() for x in Case(length=20, group_size=8, batch=3).inputs()]
    clean = run_on_ids(ids, inputs, backend=backend, group_size=8)
    for x in inputs:
        x.transpose(1, 2)[ids < 0] = torch.nan
    assert torch.equal(run_on_ids(ids, inputs, backend=backend, group_size=8), clean)


# --- layout: index arithmetic ------------------------------------------------------------------


@given(
    heads=st.integers(1, 8),
    per=st.integers(1, 4),
    group_size=st.integers(1, 99).map(lambda n: 2 * n),
)
def test_head_runs_give_each_head_the_shift_of_the_definition(
    heads: int, per: int, group_size: int
) -> None:
    total = heads * per
    shift_of: dict[int, int] = {}
    for run in head_runs(S2, total, heads, group_size):
        for head in range(run.query.start, run.query.stop):
            shift_of[head] = run.shift
            assert head // per in range(run.kv.start, run.kv.stop)
    assert list(shift_of) == list(range(total))
    for head, shift in shift_of.items():
        assert shift == group_size // 2 * reference.head_is_shifted(head, total, heads)


@given(
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=6),
    half=st.integers(1, 30),
    below=st.integers(0, 50),
    data=st.data(),
)
def test_segments_partition_documents_and_are_cut_where_i_plus_s_is_a_multiple_of_g(
    lengths: list[int], half: int, below: int, data: st.DataObject
) -> None:
    group_size = 2 * half
    shift = data.draw(st.integers(0, group_size - 1))
    starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
    cut = segments(tuple(zip(starts, lengths, strict=False)), group_size, shift, below)
    wanted = sorted(
        start + i
        for start, length in zip(starts, lengths, strict=False)
        for i in range(length)
        if i == 0 or (length > below and (i + shift) % group_size == 0)
    )
    assert [first for first, _ in cut] == wanted
    assert [a + n for a, n in cut] == [*wanted[1:], starts[-1]]


@given(st.integers(1, 200), st.integers(1, 40), st.data())
def test_ends_name_the_tokens_before_the_first_and_after_the_last_cut(
    length: int, half: int, data: st.DataObject
) -> None:
    group_size = 2 * half
    shift = data.draw(st.integers(0, group_size - 1))
    lead, groups, tail = ends(length, group_size, shift)
    assert lead + groups * group_size + tail == length
    assert tail < group_size
    assert lead == min(length, -shift % group_size)


# --- documents ---------------------------------------------------------------------------------


def test_rows_without_ids_or_positions_are_one_document_each() -> None:
    found = packing.from_ids(None, None, batch=2, length=5)
    assert found == packing.whole_rows(2, 5)
    assert found.are_rows
    assert found.intervals == ((0, 5), (5, 5))


def test_positions_that_count_up_from_any_start_are_one_document() -> None:
    for start in (0, 2, 1000):
        positions = torch.arange(start, start + 6)[None]
        assert packing.from_ids(None, positions, batch=2, length=6).are_rows


def test_documents_start_where_positions_start_anew() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]])
    found = packing.from_ids(None, positions, batch=2, length=6)
    assert found.intervals == ((0, 3), (3, 2), (5, 1), (6, 6))
    assert not found.are_rows


def test_a_hole_of_padding_ends_no_document_under_either_way_of_counting() -> None:
    ids = torch.tensor([[0, 0, -1, -1, 0, 0]])
    over_the_hole = torch.arange(6)[None]
    without_the_hole = torch.tensor([[0, 1, 1, 1, 2, 3]])
    anew = torch.tensor([[0, 1, 1, 1, 0, 1]])
    for positions, intervals in (
        (None, ((0, 4),)),
        (over_the_hole, ((0, 4),)),
        (without_the_hole, ((0, 4),)),
        (anew, ((0, 2), (2, 2))),
    ):
        found = packing.from_ids(ids, positions, batch=1, length=6)
        assert found.intervals == intervals
        assert found.real.tolist() == [0, 1, 4, 5]


def test_ids_and_positions_both_end_documents_and_rows_always_do() -> None:
    ids = torch.tensor([[0, 0, 1, 1], [1, 1, 1, -1]])
    positions = torch.tensor([[0, 1, 2, 0], [1, 2, 3, 4]])
    found = packing.from_ids(ids, positions, batch=2, length=4)
    assert found.intervals == ((0, 2), (2, 1), (3, 1), (4, 3))


def test_a_batch_of_nothing_but_padding_runs() -> None:
    ids = torch.full((2, 7), -1)
    inputs = Case(length=7, group_size=4, batch=2).inputs()
    assert run_on_ids(ids, inputs, backend="sdpa", group_size=4).isfinite().all()


def stock_mask_functions(length: int) -> dict[str, object]:
    packed = torch.arange(3).repeat_interleave(torch.tensor([5, 1, length - 6])).expand(2, -1)
    causal = masking_utils.causal_mask_function
    return {
        "causal": causal,
        "packed": masking_utils.and_masks(
            causal, masking_utils.packed_sequence_mask_function(packed)
        ),
        "wide window": masking_utils.sliding_window_causal_mask_function(length),
        "window": masking_utils.sliding_window_causal_mask_function(7),
        "bidirectional": masking_utils.bidirectional_mask_function,
        "image tokens": masking_utils.or_masks(
            causal,
            masking_utils.blockwise_overlay(torch.tensor([[-1] * 4 + [3] * (length - 4)] * 2)),
        ),
    }


@pytest.mark.parametrize("padding", ["none", "right", "left", "hole"])
@pytest.mark.parametrize("kind", ["causal", "packed", "wide window"])
def test_ids_found_in_a_mask_function_give_back_its_mask(kind: str, padding: str) -> None:
    length = 19
    function = stock_mask_functions(length)[kind]
    real = torch.ones(2, length, dtype=torch.bool)
    real[1] &= {
        "none": torch.arange(length) >= 0,
        "right": torch.arange(length) < 12,
        "left": torch.arange(length) >= 7,
        "hole": (torch.arange(length) < 8) | (torch.arange(length) >= 11),
    }[padding]
    ids, documents = packing.read_mask(function, real, batch=2, length=length, device="cpu")
    assert documents.intervals == packing.from_ids(ids, None, batch=2, length=length).intervals
    i = torch.arange(length)
    rows = torch.arange(2)[:, None, None]
    dense = function(rows, 0, i[:, None], i[None, :]).expand(2, -1, -1)
    dense = dense & real[:, None, :] & real[:, :, None]
    mine = (ids[:, :, None] == ids[:, None, :]) & (i[:, None] >= i) & real[:, None, :]
    assert torch.equal(mine & real[:, :, None], dense)
    assert torch.equal(ids == packing.PADDING, ~real)


@pytest.mark.parametrize("kind", ["window", "bidirectional", "image tokens"])
def test_masks_that_are_not_causal_over_whole_documents_have_no_ids(kind: str) -> None:
    function = stock_mask_functions(19)[kind]
    assert packing.read_mask(function, None, batch=2, length=19, device="cpu") is None


# --- bad input -----------------------------------------------------------------------------------


def call(**changes: object) -> torch.Tensor:
    arguments: dict[str, object] = {
        "query": torch.randn(1, 4, 6, 8),
        "key": torch.randn(1, 2, 6, 8),
        "value": torch.randn(1, 2, 6, 8),
        "group_size": 4,
    }
    return shifted_sparse_attention(**(arguments | changes))  # type: ignore[arg-type]


def boundaries(*cuts: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(cuts, dtype=dtype)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_size": 5}, "even and at least 2, got 5"),
        ({"group_size": 0}, "even and at least 2, got 0"),
        ({"group_size": -4}, "even and at least 2, got -4"),
        ({"group_size": 4.0}, "whole number of tokens, got 4.0"),
        ({"group_size": True}, "whole number of tokens, got True"),
        ({"full_attention_below": -1}, "must not be negative, got -1"),
        ({"query": torch.randn(4, 6, 8)}, r"query must be \[batch, heads, seq, head_dim\]"),
        (
            {"key": torch.randn(1, 3, 6, 8), "value": torch.randn(1, 3, 6, 8)},
            "multiple of kv_heads",
        ),
        (
            {"key": torch.randn(1, 0, 6, 8), "value": torch.randn(1, 0, 6, 8)},
            "multiple of kv_heads",
        ),
        ({"key": torch.randn(1, 2, 7, 8), "value": torch.randn(1, 2, 7, 8)}, "do not fit"),
        ({"key": torch.randn(1, 2, 6, 4)}, "do not fit"),
        ({"value": torch.randn(1, 4, 6, 8)}, "do not fit"),
        ({"cu_seqlens": boundaries(0, 5)}, "rise from 0 to the row's 6 tokens"),
        ({"cu_seqlens": boundaries(1, 6)}, "rise from 0"),
        ({"cu_seqlens": boundaries(0, 4, 2, 6)}, "rise from 0"),
        ({"cu_seqlens": boundaries(6)}, "rise from 0"),
        (
            {"cu_seqlens": boundaries(0, 6, dtype=torch.float32)},
            r"must be int32 \[documents \+ 1\]",
        ),
        ({"cu_seqlens": boundaries(0, 6)[None]}, r"must be int32 \[documents \+ 1\]"),
        (
            {
                "query": torch.randn(2, 2, 6, 8),
                "key": torch.randn(2, 2, 6, 8),
                "value": torch.randn(2, 2, 6, 8),
                "cu_seqlens": boundaries(0, 6),
            },
            "one packed row, got a batch of 2",
        ),
        (
            {"backend": "xformers"},
            "does not support attn_implementation: xformers; write one of sdpa",
        ),
        ({"backend": None}, "does not support attn_implementation: None"),
    ],
)
def test_bad_input_is_refused_with_what_was_given(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(**changes)


def test_good_input_of_the_refusal_tests_runs() -> None:
    assert call().shape == (1, 4, 6, 8)
    assert call(cu_seqlens=boundaries(0, 2, 6)).shape == (1, 4, 6, 8)


@pytest.mark.parametrize("shape", [(0, 4, 6, 8), (1, 4, 0, 8)])
def test_empty_input_gives_empty_output(shape: tuple[int, ...]) -> None:
    query = torch.randn(shape)
    key = value = torch.randn(shape[0], 2, *shape[2:])
    assert call(query=query, key=key, value=value).shape == shape


# --- a pattern by a user -------------------------------------------------------------------------


class GroupsWithoutShift:
    """A third-party package whose pattern is the paper's failing ablation (Table 1)."""

    pattern = AttentionPattern("groups", lambda heads, group_size: [0] * heads)

    @hookspecs.hookimpl
    def longlora_attention_patterns(self) -> dict[str, AttentionPattern]:
        return {"groups": self.pattern}


@pytest.fixture
def registered_pattern() -> AttentionPattern:
    plugin = GroupsWithoutShift()
    registry.manager().register(plugin, name="a-users-package")
    yield registry.find("longlora_attention_patterns", "groups")
    registry.manager().unregister(plugin)


@pytest.mark.parametrize("backend", DENSE)
def test_a_users_pattern_comes_through_the_hook_and_equals_its_definition(
    registered_pattern: AttentionPattern, backend: str
) -> None:
    case = Case(length=45, group_size=8, cuts=(0, 20, 45))
    inputs = case.inputs()
    attend = partial(
        shifted_sparse_attention,
        *inputs,
        group_size=8,
        cu_seqlens=torch.tensor(case.cuts),
        backend=backend,
    )
    out = attend(pattern=registered_pattern)
    mask = dense_attention.masks(case.document_ids, 8, 4, 2, shifts=[0] * 4)
    assert_near(out, dense_attention.attention(*inputs, mask), 1e-12)
    assert (out - attend()).abs().max() > 0.1


def test_the_built_in_pattern_comes_through_the_same_hook() -> None:
    assert registry.find("longlora_attention_patterns", "s2") is S2


def test_a_pattern_of_three_shifts_equals_its_definition() -> None:
    thirds = AttentionPattern("thirds", lambda heads, group_size: [0, 3, 7][:heads])
    case = Case(length=50, group_size=12, heads=6, kv_heads=3)
    inputs = case.inputs()
    mask = dense_attention.masks(case.document_ids, 12, 6, 3, shifts=[0, 0, 3, 3, 7, 7])
    for backend in DENSE:
        out = shifted_sparse_attention(*inputs, group_size=12, backend=backend, pattern=thirds)
        assert_near(out, dense_attention.attention(*inputs, mask), 1e-12)


@pytest.mark.parametrize("shifts", [[0], [0, 8], [0, -1], [0, 0, 0]])
def test_a_pattern_with_impossible_shifts_is_named(shifts: list[int]) -> None:
    bad = AttentionPattern("bad", lambda heads, group_size: shifts)
    with pytest.raises(ValueError, match=r"'bad' returned .* it must return 2 shifts from 0 to 7"):
        call(group_size=8, pattern=bad)

"""S²-Attn on tensors against its definition: values, gradients, who sees whom, padding."""

from __future__ import annotations

from dataclasses import replace

import dense_attention
import pytest
import reference
import torch
from attention_cases import DENSE, Case, assert_equals_definition, cases
from attention_material import assert_gradients_near, assert_near, attend
from hypothesis import event, given, settings
from hypothesis import strategies as st

from longlora_plugin.attention import packing

THOROUGH = settings(max_examples=250, deadline=None)


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
    out = attend(
        "eager",
        inputs,
        case.group_size,
        documents,
        full_attention_below=case.below,
        scale=case.scale,
        softcap=softcap,
        sinks_H=sinks,
    )
    expected = dense_attention.attention(
        *inputs, case.mask, scale=case.scale, softcap=softcap, sinks=sinks
    )
    assert_near(out, expected, 1e-11)
    both = [*inputs, sinks]
    assert_gradients_near((out, both), (expected, both), 1e-11)


def test_sinks_on_sdpa_are_refused_with_the_back_ends_that_have_them() -> None:
    x = torch.randn(1, 2, 4, 8)
    with pytest.raises(ValueError, match="eager, flash_attention_3 or flex_attention"):
        attend("sdpa", [x, x, x], 2, sinks_H=torch.zeros(2))


def test_dropout_drops_weights_and_keeps_their_mean() -> None:
    torch.manual_seed(0)
    query, key = torch.zeros(2, 64, 4, 16, 8)
    value = torch.ones(64, 4, 16, 8)
    for backend in DENSE:
        out = attend(backend, [query, key, value], 8, dropout=0.3)
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
    assert_gradients_near((packed, packed_inputs), (alone, alone_inputs), 1e-12)


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
    ids: torch.Tensor, inputs: list[torch.Tensor], *, backend: str, group_size: int, below: int = 0
) -> torch.Tensor:
    documents = packing.from_ids(ids, None, batch=ids.shape[0], length=ids.shape[1])
    return attend(backend, inputs, group_size, documents, full_attention_below=below)


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
    assert_gradients_near((out, inputs), (expected, inputs), 1e-11, where=real)


@pytest.mark.parametrize("backend", DENSE)
def test_values_in_padding_never_reach_real_tokens_even_if_they_are_nan(backend: str) -> None:
    ids = torch.tensor([[0] * 9 + [-1] * 11, [-1] * 6 + [0] * 14, [0] * 20])
    inputs = [x.detach() for x in Case(length=20, group_size=8, batch=3).inputs()]
    clean = run_on_ids(ids, inputs, backend=backend, group_size=8)
    for x in inputs:
        x.transpose(1, 2)[ids < 0] = torch.nan
    assert torch.equal(run_on_ids(ids, inputs, backend=backend, group_size=8), clean)


def test_a_batch_of_nothing_but_padding_runs() -> None:
    ids = torch.full((2, 7), -1)
    inputs = Case(length=7, group_size=4, batch=2).inputs()
    assert run_on_ids(ids, inputs, backend="sdpa", group_size=4).isfinite().all()

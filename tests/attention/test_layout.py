"""Index arithmetic: which tokens are cut where, and where documents begin and end."""

from __future__ import annotations

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import masking_utils

from longlora_plugin.attention import S2, packing
from longlora_plugin.attention.layout import ends, head_runs, segments


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

"""Sliding windows: what is read, what is scored, and how often."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longlora_plugin.evaluation.windows import (
    bucket_edges_for,
    default_bucket_edges,
    default_lengths,
    sliding_windows,
)


@st.composite
def layouts(draw):
    length = draw(st.integers(2, 40))
    return (
        draw(st.lists(st.integers(0, 150), min_size=1, max_size=4)),
        length,
        draw(st.integers(1, length)),
    )


@given(layouts())
def test_new_mode_scores_every_token_but_a_documents_first_exactly_once(layout):
    documents, length, stride = layout
    scored = [
        (window.document, token)
        for window in sliding_windows(documents, length, stride)
        for token in range(window.scored_from, window.end)
    ]
    assert scored == [(d, t) for d, tokens in enumerate(documents) for t in range(1, tokens)]


@given(layouts())
def test_new_mode_gives_each_token_its_windows_context(layout):
    documents, length, stride = layout
    for window in sliding_windows(documents, length, stride):
        assert 0 <= window.start < window.scored_from < window.end <= documents[window.document]
        assert window.read <= length + (stride == length)
        for token in range(window.scored_from, window.end):
            seen = token - window.start
            assert seen >= min(token, max(1, length - stride))


@given(layouts())
def test_new_mode_starts_windows_at_multiples_of_the_stride(layout):
    documents, length, stride = layout
    for window in sliding_windows(documents, length, stride):
        start = window.start + (stride == length and window.start > 0)
        assert start % stride == 0


@given(layouts())
def test_all_mode_equals_the_direct_enumeration(layout):
    documents, length, stride = layout
    expected = [
        (d, start, start + length)
        for d, tokens in enumerate(documents)
        for start in range(0, tokens, stride)
        if start + length <= tokens
    ]
    windows = sliding_windows(documents, length, stride, "all")
    assert [(w.document, w.start, w.end) for w in windows] == expected
    assert all(w.scored == length - 1 for w in windows)
    new = [(w.document, t) for w in windows for t in range(w.new_from, w.end)]
    assert len(new) == len(set(new))
    assert set(new) == {(d, t) for d, start, end in expected for t in range(start + 1, end)}


def test_known_windows_of_ten_tokens():
    windows = sliding_windows([10], 6, 3)
    assert [(w.start, w.end, w.scored_from) for w in windows] == [(0, 6, 1), (3, 9, 6), (6, 10, 9)]
    whole = sliding_windows([10], 4, 4)
    assert [(w.start, w.end, w.scored_from) for w in whole] == [(0, 4, 1), (3, 8, 4), (7, 10, 8)]


@pytest.mark.parametrize(("length", "stride"), [(8, 9), (8, 0), (1, 1)])
def test_impossible_windows_are_refused_with_what_is_allowed(length, stride):
    with pytest.raises(ValueError, match=r"(Write a stride of 1 to 8|at least 2 tokens)"):
        sliding_windows([100], length, stride)


@given(st.integers(2, 5000), st.integers(1, 5000))
def test_default_edges_cover_the_window_and_name_the_original_context(length, original):
    edges = default_bucket_edges(length, original)
    assert edges[0] == 0
    assert edges[-1] == length
    assert edges == sorted(set(edges))
    assert original >= length or original in edges


def test_default_edges_are_two_to_a_doubling():
    assert default_bucket_edges(2048, 256) == [
        0, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048,
    ]  # fmt: skip


def test_bucket_edges_are_those_given_within_the_window():
    assert bucket_edges_for(512, [0, 128, 512, 4096]) == [0, 128, 512]
    assert bucket_edges_for(512, [64]) == [0, 64, 512]


@pytest.mark.parametrize("buckets", [[4, 2], [-1, 4], [4, 4]])
def test_senseless_buckets_are_refused(buckets):
    with pytest.raises(ValueError, match=r"bucket"):
        bucket_edges_for(8, buckets)


def test_default_lengths_double_from_the_original_context_to_the_target():
    assert default_lengths(256, 2048) == [256, 512, 1024, 2048]
    assert default_lengths(4096, 10000) == [4096, 8192, 10000]
    assert default_lengths(4096, 2048) == [2048]

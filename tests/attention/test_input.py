"""`shifted_sparse_attention` given wrong values, none at all, and patterns by a user."""

from __future__ import annotations

from functools import partial

import dense_attention
import pytest
import torch
from attention_cases import DENSE, Case
from attention_material import assert_near

from longlora_plugin import hookspecs, registry
from longlora_plugin.attention import S2, AttentionPattern, shifted_sparse_attention


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

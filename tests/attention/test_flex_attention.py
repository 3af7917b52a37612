"""FlexAttention: the block masks of S²-Attn, PyTorch's kernel, a stand-in with gradients."""

from __future__ import annotations

from typing import Any

import dense_attention
import pytest
import torch
from attention_material import (
    assert_gradients_near,
    assert_near,
    attend,
    batches,
    logits_and_gradients,
    random_qkv,
    tiny_llama,
)
from torch.nn.attention.flex_attention import BlockMask
from transformers.integrations import flex_attention as hf_flex

from longlora_plugin.attention import (
    S2,
    enable_shifted_attention,
    flex,
    packing,
    shifted_sparse_attention,
)
from longlora_plugin.attention.layout import HeadRun, head_runs, segments


def block_masks_of(
    lengths: list[int], heads: int, kv_heads: int, group_size: int, below: int = 0
) -> list[tuple[HeadRun, BlockMask]]:
    runs = head_runs(S2, heads, kv_heads, group_size)
    total = sum(lengths)
    documents = packing.from_boundaries(torch.tensor([0, *lengths]).cumsum(0), total)
    cuts = tuple(segments(documents.intervals, group_size, run.shift, below) for run in runs)
    masks = flex._block_masks(cuts, total, torch.device("cpu"))
    return list(zip(runs, masks, strict=True))


def listed(counts: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """[1, H, M] and [1, H, M, M] of a BlockMask → bool [H, M, M]: is the block in the list?"""
    columns = counts.shape[-1]
    chosen = torch.zeros(counts.shape[1], columns, columns, dtype=torch.bool)
    for head in range(counts.shape[1]):
        for row in range(columns):
            chosen[head, row, indices[0, head, row, : counts[0, head, row]].long()] = True
    return chosen


FLEX_LAYOUTS = [
    ([1], 2),
    ([127], 64),
    ([128], 64),
    ([129], 256),
    ([640], 512),
    ([650], 512),
    ([513], 384),
    ([700], 2000),
    ([130, 1, 300, 256, 90], 300),
    ([256, 256], 256),
    ([384, 127, 129], 512),
]


@pytest.mark.parametrize("heads", [(4, 2), (3, 1), (1, 1)])
@pytest.mark.parametrize(("lengths", "group_size"), FLEX_LAYOUTS)
def test_block_mask_lists_exactly_the_blocks_that_hold_an_allowed_pair(
    lengths: list[int], group_size: int, heads: tuple[int, int]
) -> None:
    below = 127
    total = sum(lengths)
    ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    mask = dense_attention.masks(ids, group_size, *heads, below)
    blocks = -(-total // flex.BLOCK)
    padded = torch.zeros(heads[0], blocks * flex.BLOCK, blocks * flex.BLOCK, dtype=torch.bool)
    padded[:, :total, :total] = mask
    tiles = padded.view(heads[0], blocks, flex.BLOCK, blocks, flex.BLOCK).transpose(2, 3)
    some, all_ = tiles.flatten(3).any(-1), tiles.flatten(3).all(-1)
    i = torch.arange(total)
    for run, block_mask in block_masks_of(lengths, *heads, group_size, below):
        partial = listed(block_mask.kv_num_blocks, block_mask.kv_indices)
        full = listed(block_mask.full_kv_num_blocks, block_mask.full_kv_indices)
        assert torch.equal(block_mask.to_dense()[0].bool(), some[run.query][:1])
        assert torch.equal((partial | full).expand_as(some[run.query]), some[run.query])
        assert torch.equal(full.expand_as(all_[run.query]), all_[run.query]), (
            "a full block is computed without asking mask_mod"
        )
        assert not (partial & full).any()
        zero = torch.tensor(0)
        asked = block_mask.mask_mod(zero, zero, i[:, None], i[None, :])
        assert torch.equal(asked.expand_as(mask[run.query]), mask[run.query])


def flex_stand_in(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    training: bool = False,
    **kwargs: Any,
) -> torch.Tensor:
    """`compile_friendly_flex_attention` by definition: only listed blocks, full ones unmasked."""
    block_mask = kwargs["block_mask"]
    length = query.shape[2]
    partial = listed(block_mask.kv_num_blocks, block_mask.kv_indices)
    full = listed(block_mask.full_kv_num_blocks, block_mask.full_kv_indices)
    i = torch.arange(length)
    head = torch.arange(query.shape[1])[:, None, None]
    asked = block_mask.mask_mod(torch.tensor(0), head, i[:, None], i[None, :])
    block = i // flex.BLOCK
    here = (slice(None), block[:, None], block[None, :])
    mask = full[here] | (partial[here] & asked)
    assert kwargs["enable_gqa"] or query.shape[1] == key.shape[1]
    assert kwargs.get("return_aux") is None
    out = dense_attention.attention(query, key, value, mask, scale=kwargs["scale"])
    return out.to(query.dtype)


def torch_flex(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    training: bool = False,
    **kwargs: Any,
) -> torch.Tensor:
    """PyTorch's own FlexAttention, uncompiled: forward only on a CPU."""
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention(query, key, value, **kwargs)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("heads", [(4, 2), (3, 1), (3, 3), (1, 1), (6, 3)])
@pytest.mark.parametrize(("lengths", "group_size"), FLEX_LAYOUTS[2:])
def test_torchs_flex_attention_equals_the_definition_forward(
    lengths: list[int], group_size: int, heads: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf_flex, "compile_friendly_flex_attention", torch_flex)
    total = sum(lengths)
    ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    with torch.no_grad():
        qkv = random_qkv(total, *heads, dtype=torch.float32)
        out = shifted_sparse_attention(
            *qkv,
            group_size=group_size,
            cu_seqlens=torch.tensor([0, *lengths]).cumsum(0),
            full_attention_below=127,
            backend="flex_attention",
        )
    mask = dense_attention.masks(ids, group_size, *heads, 127)
    assert_near(out, dense_attention.attention(*qkv, mask), 1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_softcap_reaches_flex_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_flex, "compile_friendly_flex_attention", torch_flex)
    with torch.no_grad():
        qkv = random_qkv(200, dtype=torch.float32)
        out = attend("flex_attention", qkv, 90, softcap=0.5)
    mask = dense_attention.masks(torch.zeros(200), 90, 4, 2)
    assert_near(out, dense_attention.attention(*qkv, mask, softcap=0.5), 1e-5)


@pytest.mark.parametrize("heads", [(4, 2), (3, 1), (6, 3)])
@pytest.mark.parametrize(("lengths", "group_size"), FLEX_LAYOUTS[3:])
def test_gradients_through_the_block_mask_equal_the_definition(
    lengths: list[int], group_size: int, heads: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf_flex, "compile_friendly_flex_attention", flex_stand_in)
    total = sum(lengths)
    ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    qkv = random_qkv(total, *heads, dtype=torch.float64)
    out = shifted_sparse_attention(
        *qkv,
        group_size=group_size,
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0),
        backend="flex_attention",
    )
    expected = dense_attention.attention(*qkv, dense_attention.masks(ids, group_size, *heads))
    assert_near(out, expected, 1e-12)
    assert_gradients_near((out, qkv), (expected, qkv), 1e-12)


@pytest.mark.parametrize("kind", list(batches()))
def test_a_model_on_flex_attention_trains_like_on_sdpa_with_one_block_mask_for_all_layers(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf_flex, "compile_friendly_flex_attention", flex_stand_in)
    batch = batches()[kind]
    model = tiny_llama(3, torch.float32)
    handle = enable_shifted_attention(model, group_size=16)
    logits, gradients = logits_and_gradients(model, batch)
    handle.remove()
    model.set_attn_implementation("flex_attention")
    handle = enable_shifted_attention(model, group_size=16)
    flex._block_masks.cache_clear()
    flex_logits, flex_gradients = logits_and_gradients(model, batch)
    logits_and_gradients(model, batch)
    handle.remove()
    assert flex._block_masks.cache_info().misses == 1
    assert flex._block_masks.cache_info().hits == 5
    assert_near(flex_logits, logits, 1e-5)
    for one, other in zip(flex_gradients, gradients, strict=True):
        assert_near(one, other, 1e-5)


@pytest.mark.parametrize("tokens", [1000, 4096])
def test_block_masks_take_16_bytes_a_pair_of_blocks_for_each_run_of_heads(tokens: int) -> None:
    masks = block_masks_of([tokens], 32, 32, 512)
    blocks = -(-tokens // flex.BLOCK)
    assert len(masks) == 2, "one for each half of the heads, not for each head"
    for _, mask in masks:
        held = [x for x in vars(mask).values() if isinstance(x, torch.Tensor)]
        # Lists of partial and of full blocks, by rows and by columns, int32.
        assert sum(x.nbytes for x in held) == 16 * blocks**2 + 16 * blocks
    assert flex._block_masks.cache_info().maxsize <= 2

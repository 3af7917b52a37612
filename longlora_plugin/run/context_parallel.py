"""Rows that several GPUs share, as a recipe asks for it in any of Axolotl's three spellings.

Axolotl cuts the rows and runs full attention over them; how depends on its version. S²-Attn takes
the place of that attention in training, with the same shards (`attention/shards.py`), so these must
be contiguous, and every process of a group must hold a part of the same row.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from packaging.version import Version

from longlora_plugin.args import LongLoRAConfig
from longlora_plugin.attention.layout import (
    LOCAL_FREQUENCIES,
    group_sizes_that_divide,
    halo_tokens,
)
from longlora_plugin.run.axolotl_keys import attention_implementation, deepspeed_settings

FLAT = ("context_parallel_size", "sequence_parallel_degree")
BLOCK = "context_parallel"


def spellings_of(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Key as the recipe writes it → its value, for each that it sets."""
    block = recipe.get(BLOCK)
    given = {key: recipe.get(key) for key in FLAT}
    given[f"{BLOCK}.size"] = block.get("size") if isinstance(block, Mapping) else None
    return {key: value for key, value in given.items() if value}


def context_parallel_size(recipe: Mapping[str, Any]) -> int:
    """How many GPUs share a row, by any of Axolotl's spellings.

    Raises:
        ValueError: a value is not a whole number.
    """
    sizes = [1]
    for key, value in spellings_of(recipe).items():
        try:
            sizes.append(int(value))
        except (TypeError, ValueError):
            raise ValueError(
                f"{key}: got {value!r}; write how many GPUs share a row, such as {key}: 8"
            ) from None
    return max(sizes)


def splits_with_ring_flash_attn() -> bool:
    """Whether this Axolotl is older than 0.20, which brought `context_parallel:` and ringmaster."""
    return Version(importlib.metadata.version("axolotl")) < Version("0.20.dev0")


def package_that_cuts_rows() -> str:
    """What Axolotl cuts rows with, but for DeepSpeed."""
    return "ring_flash_attn" if splits_with_ring_flash_attn() else "ringmaster"


def problems_of(
    recipe: Mapping[str, Any], block: LongLoRAConfig, rope_types: Collection[Any]
) -> Iterator[str]:
    """Why this recipe cannot train with rows that several GPUs share.

    Args:
        rope_types: of the run's RoPE.
    """
    given = {key: value for key, value in spellings_of(recipe).items() if str(value) != "1"}
    if not given:
        return
    key, size = next(iter(given.items()))
    said = f"{key}: {size} does not work with"
    version = importlib.metadata.version("axolotl")
    if recipe.get("deepspeed"):
        yield from (f"{said} {problem}" for problem in _problems_of_deepspeed(recipe, version))
    if splits_with_ring_flash_attn():
        if list(given) == [f"{BLOCK}.size"]:
            instead = f"write context_parallel_size: {size}"
            yield f"{key}: {size}: Axolotl {version} ignores it; {instead}"
        if recipe.get("cut_cross_entropy"):
            yield (
                f"{said} cut_cross_entropy in Axolotl {version}: nobody has tried whether it takes "
                "targets that are shifted before rows are cut; write chunked_cross_entropy: true"
            )
    nested = recipe.get(BLOCK)
    if isinstance(nested, Mapping) and nested.get("load_balance") == "head_tail":
        yield (
            f"{BLOCK}.load_balance: head_tail does not work with shifted attention: it gives a GPU "
            "two pieces of the row that are apart; write load_balance: none, which S² needs no "
            "balance for"
        )
    for kind in sorted(set(LOCAL_FREQUENCIES) & set(rope_types)):
        yield (
            f"{said} RoPE of type {kind}: it takes its frequencies from the longest position "
            "that a process sees, and each sees its own part of the row; write longlora: "
            "{rope: yarn}, with a base that does not come with it"
        )
    if recipe.get("rl"):
        yield (
            f"{said} rl: {recipe['rl']}: its losses are of whole rows; use it for fine-tuning "
            "without rl"
        )
    if block.held_out:
        yield (
            f"{said} longlora.held_out: it scores whole rows while training; remove held_out, "
            "write val_set_size, and run longlora eval afterwards"
        )


def _problems_of_deepspeed(recipe: Mapping[str, Any], version: str) -> Iterator[str]:
    instead = "fsdp_version: 2 and fsdp_config instead of deepspeed"
    if Version(version) < Version("0.21.dev0"):
        old = Version(version) < Version("0.20.dev0")
        why = (
            "each process would cut another row"
            if old
            else "rows of all processes but one would be dropped"
        )
        yield f"deepspeed in Axolotl {version}: {why}; write {instead}"
        return
    implementation = attention_implementation(recipe)
    if recipe.get("sample_packing") and "flash" not in implementation:
        yield (
            f"deepspeed, sample_packing and attn_implementation: {implementation}: evaluation and "
            "steps with full attention would go across documents, of which DeepSpeed tells "
            f"FlashAttention alone; write attn_implementation: flash_attention_2, or {instead}"
        )
    zero = deepspeed_settings(recipe).get("zero_optimization")
    if isinstance(zero, Mapping) and zero.get("stage") == 3 and zero.get("reduce_scatter") is False:
        yield (
            f'"reduce_scatter": false under ZeRO-3 in {recipe["deepspeed"]}: DeepSpeed would sum '
            "the gradients of small tensors and average those of large ones; remove that line"
        )


def updates_of(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Keys for Axolotl: without them it may give a GPU two pieces of a row that are apart."""
    size = context_parallel_size(recipe)
    if size == 1 or splits_with_ring_flash_attn():
        return {}
    given = recipe.get(BLOCK)
    nested = dict(given) if isinstance(given, Mapping) else {}
    if nested.get("load_balance") not in (None, "auto"):
        return {}
    return {BLOCK: {**nested, "size": size, "load_balance": "none"}}


def group_warning(group_size: int, sequence_len: int, processes: int) -> str | None:
    """What to know where a group does not divide the part of a row that a GPU holds."""
    shard = -(-sequence_len // processes)
    if processes == 1 or shard % group_size == 0:
        return None
    most = max(
        halo_tokens(shard, group_size, shift, rank)
        for rank in range(processes)
        for shift in (0, group_size // 2)
    )
    near = [size for size in group_sizes_that_divide(shard) if size <= group_size]
    best = near[-1] if near else 2
    return (
        f"group size {group_size} does not divide the {shard} tokens of a GPU (sequence_len / "
        f"context_parallel_size): a layer gets up to {most} tokens of the GPUs before, for all its "
        f"heads. The nearest that does, longlora: {{group_size: {best}}}, gets {best // 2}, for "
        "half of the heads"
    )

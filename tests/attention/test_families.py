"""S²-Attn in every decoder family of the installed transformers, at tiny random sizes.

How they are compared with the original is in `family_runs.py`; which layers S² must cover is
spelled out by hand in `families.py`, not asked of the package.

`python tests/attention/test_families.py --write` writes the table in `docs/reference/families.md`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from attention_material import Enable
from families import FAMILIES
from family_runs import (
    DOCUMENTS,
    TOKENS,
    TOLERANCE,
    build,
    compare,
    error,
    logits,
    logits_in_float64,
    masked_per_head,
    refusal,
    tokens,
)
from unsupported_families import UNSUPPORTED

from longlora_plugin.plan.shape import shape_of

TABLE = Path(__file__).parents[2] / "docs" / "reference" / "families.md"

CASES = [
    pytest.param(name, implementation, id=f"{name}-{implementation}")
    for name, family in FAMILIES.items()
    for implementation in family.implementations
]
each_family_and_implementation = pytest.mark.parametrize(("name", "implementation"), CASES)
each_family = pytest.mark.parametrize(
    ("name", "implementation"),
    [  # the implementations take turns
        pytest.param(name, family.implementations[i % len(family.implementations)], id=name)
        for i, (name, family) in enumerate(FAMILIES.items())
    ],
)


# --- what must hold in every family ---------------------------------------------------------


@each_family_and_implementation
def test_training_equals_the_stock_model_under_a_mask_per_head(
    name: str, implementation: str
) -> None:
    assert compare(name, implementation).error < TOLERANCE


@each_family_and_implementation
def test_every_full_attention_layer_is_shifted_and_the_others_are_named(
    name: str, implementation: str
) -> None:
    family, seen = FAMILIES[name], compare(name, implementation)
    assert (seen.layers, seen.skipped) == (family.layers, family.skipped)
    assert seen.calls == (family.calls or family.layers)
    assert seen.from_full_attention > 1e-4


@pytest.mark.parametrize("name", FAMILIES)
def test_plan_counts_a_fully_attending_layer_for_each_call_of_shifted_attention(name: str) -> None:
    family = FAMILIES[name]
    shape = shape_of(build(name, family.implementations[0]))
    calls = family.layers if name == "diffllama" else family.calls  # two calls of half the width
    assert shape.full_layers - shape.unshifted == (calls or family.layers)


@each_family_and_implementation
def test_evaluation_while_enabled_and_training_after_remove_are_bit_for_bit_stock(
    name: str, implementation: str, enable: Enable
) -> None:
    model, ids = build(name, implementation), tokens(2)
    stock_training = logits(model, ids)
    stock_evaluation = logits(model.eval(), ids)
    handle = enable(model)
    assert torch.equal(logits(model, ids), stock_evaluation)
    assert handle.calls == 0
    model.train()
    assert not torch.equal(logits(model, ids), stock_training)
    handle.remove()
    assert torch.equal(logits(model, ids), stock_training)
    assert torch.equal(logits(model.eval(), ids), stock_evaluation)


@each_family
def test_no_token_sees_a_later_one_in_training(
    name: str, implementation: str, enable: Enable
) -> None:
    model, ids = build(name, implementation), tokens(1)
    enable(model)
    changed = ids.clone()
    changed[0, -1] = (changed[0, -1] - 10 + 1) % 87 + 10
    before, after = (logits_in_float64(model, x)[0].detach() for x in (ids, changed))
    assert error(after[:-1], before[:-1]) < TOLERANCE
    assert error(after[-1], before[-1]) > 1e-3


@each_family
def test_rows_padded_on_either_side_equal_the_rows_alone(
    name: str, implementation: str, enable: Enable
) -> None:
    model = build(name, implementation)
    enable(model)
    ids, padding = tokens(3), torch.ones(3, TOKENS, dtype=torch.long)
    short = 13
    sides = {"right": (1, slice(0, short)), "left": (2, slice(TOKENS - short, TOKENS))}
    for row, real in sides.values():
        padding[row] = 0
        padding[row, real] = 1
    padded = logits_in_float64(
        model,
        ids * padding,
        attention_mask=padding,
        position_ids=(padding.cumsum(1) - 1).clamp(min=0),
    )
    assert error(padded[0], logits_in_float64(model, ids[:1])[0]) < TOLERANCE
    if FAMILIES[name].shares_mask:
        del sides["left"]  # MiniMax M3's sparse layers choose blocks that count from the padding
    for side, (row, real) in sides.items():
        alone = logits_in_float64(model, ids[row : row + 1, real])[0]
        assert error(padded[row, real], alone) < TOLERANCE, side


@pytest.mark.parametrize("mask", ["no-mask", "mask-of-ones"])
@each_family
def test_packed_documents_equal_the_documents_alone(
    name: str, implementation: str, mask: str, enable: Enable
) -> None:
    family, model, ids = FAMILIES[name], build(name, implementation), tokens()
    packed: dict[str, Any] = {
        "position_ids": torch.cat([torch.arange(length) for length in DOCUMENTS])[None]
    }
    inputs = dict(packed)
    if mask == "mask-of-ones":
        # Stock transformers looks for packed documents only where there is no mask.
        inputs["attention_mask"] = torch.ones(1, TOKENS, dtype=torch.long)
    with masked_per_head(model, name, implementation, DOCUMENTS):
        expected = logits_in_float64(model, ids, **(packed if family.shares_mask else inputs))
    enable(model)
    actual = logits_in_float64(model, ids, **inputs)
    assert error(actual, expected) < TOLERANCE
    if family.packing or (family.skipped and mask == "mask-of-ones"):
        return  # stock layers that S² does not cover mix documents here
    alone = [logits_in_float64(model, part)[0] for part in ids.split(DOCUMENTS, dim=1)]
    assert error(actual[0], torch.cat(alone)) < TOLERANCE


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.packing])
def test_stock_model_mixes_packed_documents_where_the_table_says_so(name: str) -> None:
    model, ids = build(name, FAMILIES[name].implementations[0]), tokens()
    position_ids = torch.cat([torch.arange(length) for length in DOCUMENTS])[None]
    packed = logits_in_float64(model, ids, position_ids=position_ids)
    alone = [logits_in_float64(model, part)[0] for part in ids.split(DOCUMENTS, dim=1)]
    assert error(packed[0], torch.cat(alone)) > 1e-3


# --- the table in the docs ------------------------------------------------------------------

INTRODUCTION = """# Model families

S²-Attn needs no code for a model family: it goes through transformers' two registries of attention
and mask functions. This page lists what was checked, with transformers {version}, by
`tests/attention/test_families.py`; it is written by
`python tests/attention/test_families.py --write`.

Each row is a tiny random model in float64 (where the family's code asks for float32, it is given
float64 as well). Its training output and the gradient of every parameter equal those of
transformers' own model under an explicit mask per head, up to the error shown, which is relative
to the largest number expected; the test allows {tolerance:.0e}. Moreover, for every row:
evaluation is bit for bit the original while S²-Attn is enabled, and training is after `remove()`;
no token sees a later one; rows padded on the left or on the right equal the rows alone; packed
documents equal the documents alone, or, where the last column says that the original model's other
layers mix them, the original model under the documents' mask.

Layers with a sliding window shorter than `max_position_embeddings`, with chunks, and those without
attention keep the original path; `handle.skipped` counts them. Families that are not on this page
may work: after a training step, `handle.calls` tells whether S²-Attn ran.

## Supported: {supported}

| family | covered layers | not covered | attention | precision | max error | packed documents |
|---|---|---|---|---|---|---|
"""
REFUSED = """
Vision and audio towers and cross-attention are never covered. `sdpa` ignores Gemma 2's softcap, in
transformers itself as here; `eager` applies it. Image tokens that see each other (Gemma 3 with
images) need a mask that is not causal: training then stops with an error that says so.

## Refused: {refused}

`enable_shifted_attention` raises a ValueError with this reason.

| family | reason |
|---|---|
"""
ERROR_COLUMN = 6


def supported_row(name: str) -> str:
    family = FAMILIES[name]
    seen = {
        implementation: compare(name, implementation) for implementation in family.implementations
    }
    first = next(iter(seen.values()))
    cells = [
        f"`{name}`",
        f"{first.layers} of {first.layers + sum(first.skipped.values())}",
        "; ".join(f"{count} × {reason}" for reason, count in first.skipped.items()) or "—",
        ", ".join(seen),
        "float64",
        f"{max(comparison.error for comparison in seen.values()):.0e}",
        f"original layers mix them: {family.packing}" if family.packing else "kept apart",
    ]
    return f"| {' | '.join(cells)} |"


def table() -> str:
    """The page `docs/reference/families.md`."""
    page = INTRODUCTION.format(
        version=transformers.__version__, tolerance=TOLERANCE, supported=len(FAMILIES)
    )
    page += "".join(f"{supported_row(name)}\n" for name in sorted(FAMILIES))
    page += REFUSED.format(refused=len(UNSUPPORTED))
    page += "".join(f"| `{name}` | {refusal(name)} |\n" for name in sorted(UNSUPPORTED))
    return page


def without_errors(page: str) -> tuple[list[str], list[float]]:
    """The page's lines without the column of errors, which rounding changes, and that column."""
    lines, errors = [], []
    for line in page.splitlines():
        cells = line.split("|")
        if len(cells) == 9 and "e-" in cells[ERROR_COLUMN]:
            errors.append(float(cells.pop(ERROR_COLUMN)))
        lines.append("|".join(cells))
    return lines, errors


def test_committed_table_is_up_to_date() -> None:
    written = TABLE.read_text()
    if f"transformers {transformers.__version__}," not in written:
        pytest.skip(f"the table is of another transformers than {transformers.__version__}")
    lines, errors = without_errors(written)
    assert lines == without_errors(table())[0]
    assert len(errors) == len(FAMILIES)
    assert max(errors) < TOLERANCE


def test_table_holds_at_least_the_promised_families() -> None:
    promised = (
        "llama mistral mixtral qwen2 qwen2_moe qwen3 qwen3_moe gemma gemma2 gemma3 phi phi3 "
        "gpt_neox falcon stablelm starcoder2 cohere cohere2 olmo2 granite glm4 smollm3 nemotron "
        "helium ernie4_5 exaone4 deepseek_v3 gpt_oss seed_oss"
    )
    assert set(promised.split()) <= set(FAMILIES) | set(UNSUPPORTED)
    assert len(FAMILIES) >= 30


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        raise SystemExit("usage: python tests/attention/test_families.py --write")
    TABLE.parent.mkdir(parents=True, exist_ok=True)
    TABLE.write_text(table())

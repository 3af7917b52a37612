"""S²-Attn in every decoder family of the installed transformers, at tiny random sizes.

The reference is the *stock* model in training mode whose full-attention layers are handed an
explicit mask per head, [batch, heads, tokens, tokens], written by `tests/reference.py`. Which
layers those are is spelled out by hand in `FAMILIES`, not asked of the package.

Models compute in float32 here and there (norms, softmax, RoPE) whatever their dtype; `in_float64`
turns that off on both sides, so that the comparison is a float64 one.

`python tests/attention/test_families.py --write` writes the table in `docs/reference/families.md`.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.overrides import TorchFunctionMode

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from families import FAMILIES, IMAGE_TOKENS, UNSUPPORTED, build_family
from reference import head_masks

from longlora_plugin.attention import enable_shifted_attention
from longlora_plugin.plan import forward_flops, shape_of

GROUP, TOKENS = 8, 21
DOCUMENTS = [12, 9]
TOLERANCE = 1e-9
"""Largest relative error in float64, of logits and of every parameter's gradient."""
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


# --- models and runs ------------------------------------------------------------------------


class InFloat64(TorchFunctionMode):
    """Where code asks for float32, give it float64."""

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        args = tuple(torch.float64 if x is torch.float32 else x for x in args)
        kwargs = {k: torch.float64 if x is torch.float32 else x for k, x in (kwargs or {}).items()}
        return func(*args, **kwargs)


def build(name: str, implementation: str) -> torch.nn.Module:
    """The family's tiny model, always with the same random weights, in float64 and training."""
    return build_family(name, FAMILIES[name], implementation)


def tokens(rows: int = 1, length: int = TOKENS, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(10, 97, (rows, length), generator=generator)


def logits(model: torch.nn.Module, ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
    """[rows, tokens, vocabulary]; routers that draw at random draw the same each time."""
    torch.manual_seed(0)
    zeros = {name: torch.zeros_like(ids) for name in FAMILIES[model.family].zeros}
    return model(ids, **{"use_cache": False, **zeros, **inputs}).logits


def logits_in_float64(model: torch.nn.Module, ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
    with InFloat64():
        return logits(model, ids, **inputs)


def gradients(model: torch.nn.Module, out: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of a fixed random weighing of the logits, for every parameter that takes part."""
    model.zero_grad()
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=out.dtype)
    with InFloat64():
        (out * weights).sum().backward()
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def error(actual: torch.Tensor, expected: torch.Tensor, floor: float = 0.0) -> float:
    """Largest difference, relative to the largest number expected or to `floor`, if greater."""
    largest = max(expected.abs().max().item(), floor)
    return (actual - expected).abs().max().item() / (largest or 1.0)


@contextmanager
def masked_per_head(
    model: torch.nn.Module,
    name: str,
    implementation: str,
    documents: list[int] | None = None,
    only: tuple[int, ...] | None = None,
) -> Iterator[None]:
    """The stock model, its full-attention layers handed the oracle's mask per head."""
    family = FAMILIES[name]
    mask = head_masks(documents or [TOKENS], GROUP, family.heads, family.kv_heads)[None]
    if implementation == "eager":
        forbidden = torch.finfo(torch.float64).min
        mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, forbidden)

    def hand_over(module: torch.nn.Module, args: Any, kwargs: Any) -> Any:
        given = inspect.signature(module.forward).bind(*args, **kwargs)
        stock = given.arguments.get("attention_mask")
        given.arguments["attention_mask"] = (
            {**stock, "causal": mask} if isinstance(stock, dict) else mask  # Zaya's is a dict
        )
        return given.args, given.kwargs

    layers = [
        module
        for module in model.modules()
        if getattr(module, "layer_idx", None) in (only or family.full)
        and type(module).__name__.endswith(("Attention", "MLA"))
        and "attention_mask" in inspect.signature(module.forward).parameters
    ]
    assert len(layers) == (len(only) if only else family.layers), [type(layer) for layer in layers]
    hooks = [layer.register_forward_pre_hook(hand_over, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@dataclass(frozen=True)
class Comparison:
    """Shifted training against the stock model under a mask per head."""

    error: float
    from_full_attention: float
    layers: int
    calls: int
    skipped: dict[str, int]


@cache
def compare(name: str, implementation: str) -> Comparison:
    model, ids = build(name, implementation), tokens(2)
    full = logits_in_float64(model, ids).detach()
    with masked_per_head(model, name, implementation):
        expected = logits_in_float64(model, ids)
        expected_gradients = gradients(model, expected)
    handle = enable_shifted_attention(model, group_size=GROUP)
    actual = logits_in_float64(model, ids)
    calls = handle.calls
    actual_gradients = gradients(model, actual)
    assert actual_gradients.keys() == expected_gradients.keys()
    # Some gradients are zero but for rounding: the bias of keys changes no softmax.
    floor = 1e-5 * max(gradient.abs().max().item() for gradient in expected_gradients.values())
    errors = [error(actual, expected)] + [
        error(actual_gradients[key], expected_gradients[key], floor) for key in expected_gradients
    ]
    return Comparison(max(errors), error(actual, full), handle.layers, calls, handle.skipped)


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
    shape = shape_of(build_family(name, family, family.implementations[0]))
    calls = family.layers if name == "diffllama" else family.calls  # two calls of half the width
    assert shape.full_layers - shape.unshifted == (calls or family.layers)


@each_family_and_implementation
def test_evaluation_while_enabled_and_training_after_remove_are_bit_for_bit_stock(
    name: str, implementation: str
) -> None:
    model, ids = build(name, implementation), tokens(2)
    stock_training = logits(model, ids)
    stock_evaluation = logits(model.eval(), ids)
    handle = enable_shifted_attention(model, group_size=GROUP)
    assert torch.equal(logits(model, ids), stock_evaluation)
    assert handle.calls == 0
    model.train()
    assert not torch.equal(logits(model, ids), stock_training)
    handle.remove()
    assert torch.equal(logits(model, ids), stock_training)
    assert torch.equal(logits(model.eval(), ids), stock_evaluation)


@each_family
def test_no_token_sees_a_later_one_in_training(name: str, implementation: str) -> None:
    model, ids = build(name, implementation), tokens(1)
    enable_shifted_attention(model, group_size=GROUP)
    changed = ids.clone()
    changed[0, -1] = (changed[0, -1] - 10 + 1) % 87 + 10
    before, after = (logits_in_float64(model, x)[0].detach() for x in (ids, changed))
    assert error(after[:-1], before[:-1]) < TOLERANCE
    assert error(after[-1], before[-1]) > 1e-3


@each_family
def test_rows_padded_on_either_side_equal_the_rows_alone(name: str, implementation: str) -> None:
    model = build(name, implementation)
    enable_shifted_attention(model, group_size=GROUP)
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
    name: str, implementation: str, mask: str
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
    enable_shifted_attention(model, group_size=GROUP)
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


# --- what is not covered --------------------------------------------------------------------


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_family_is_refused_with_the_reason(name: str) -> None:
    assert refusal(name).count(UNSUPPORTED[name][1]) == 1


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_plan_lets_shifted_attention_save_nothing_in_an_unsupported_family(name: str) -> None:
    model = build_family(name, UNSUPPORTED[name][0], "eager")
    shape = shape_of(model)
    assert shape.full_layers == shape.unshifted
    assert forward_flops(shape, 64, 8) == forward_flops(shape, 64)


@cache
def refusal(name: str) -> str:
    """Why S² covers no layer of an unsupported family."""
    model = build_family(name, UNSUPPORTED[name][0], "eager")
    with pytest.raises(ValueError, match="shifted attention covers no layer of ") as raised:
        enable_shifted_attention(model, group_size=GROUP)
    return str(raised.value).split(": ", 1)[1]


def test_window_as_long_as_the_context_counts_as_full_attention() -> None:
    family = replace(FAMILIES["mistral"], config={"sliding_window": 256})
    model = build_family("mistral", family, "sdpa")
    assert enable_shifted_attention(model, group_size=GROUP).layers == 2
    padding = torch.ones(2, TOKENS, dtype=torch.long)
    padding[1, 13:] = 0
    ids = tokens(2)
    padded = logits_in_float64(model, ids, attention_mask=padding)
    assert error(padded[1, :13], logits_in_float64(model, ids[1:, :13])[0]) < TOLERANCE


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["gemma3_text", "llama4_text", "minimax_m3_vl_text"])
def test_stock_layers_keep_their_mask_in_rows_shorter_than_their_window(
    name: str, implementation: str, padded: bool
) -> None:
    wide = {"sliding_window": 64, "attention_chunk_size": 64, "index_block_size": 64}
    family = FAMILIES[name]
    config = {key: wide.get(key, value) for key, value in family.config.items()}
    model, ids = build_family(name, replace(family, config=config), implementation), tokens()
    padding = torch.ones(1, TOKENS, dtype=torch.long)
    if padded:
        padding[0, 13:] = 0
    documents = [13, TOKENS - 13] if padded else [TOKENS]
    with masked_per_head(model, name, implementation, documents):
        expected = logits_in_float64(model, ids, attention_mask=padding)
    enable_shifted_attention(model, group_size=GROUP)
    actual = logits_in_float64(model, ids, attention_mask=padding)
    real = slice(0, 13 if padded else TOKENS)
    assert error(actual[:, real], expected[:, real]) < TOLERANCE


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_layer_left_in_evaluation_keeps_its_stock_mask(implementation: str, padded: bool) -> None:
    model, ids = build("llama", implementation), tokens()
    padding = torch.ones(1, TOKENS, dtype=torch.long)
    if padded:
        padding[0, 13:] = 0
    model.model.layers[0].eval()
    documents = [13, TOKENS - 13] if padded else [TOKENS]
    with masked_per_head(model, "llama", implementation, documents, only=(1,)):
        expected = logits_in_float64(model, ids, attention_mask=padding)
    handle = enable_shifted_attention(model, group_size=GROUP)
    actual = logits_in_float64(model, ids, attention_mask=padding)
    assert handle.calls == 1
    assert error(actual[:, : documents[0]], expected[:, : documents[0]]) < TOLERANCE


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_images_go_through_the_stock_vision_tower(implementation: str) -> None:
    model, ids = build("llava", implementation), tokens()
    ids[0, 2:6] = IMAGE_TOKENS["image_token_id"]
    pixels = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(3)).double()
    with masked_per_head(model, "llava", implementation):
        expected = logits_in_float64(model, ids, pixel_values=pixels)
    handle = enable_shifted_attention(model, group_size=GROUP)
    actual = logits_in_float64(model, ids, pixel_values=pixels)
    assert error(actual, expected) < TOLERANCE
    assert handle.calls == 2
    assert error(logits_in_float64(model, ids, pixel_values=2 * pixels), actual) > 1e-3


def test_image_tokens_that_see_each_other_are_refused_not_made_causal() -> None:
    model, ids = build("gemma3", "sdpa"), tokens()
    ids[0, 2:6] = IMAGE_TOKENS["image_token_id"]
    images = (ids == IMAGE_TOKENS["image_token_id"]).long()
    pixels = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(3)).double()
    enable_shifted_attention(model, group_size=GROUP)
    with pytest.raises(ValueError, match="needs plain causal attention"):
        logits(model, ids, pixel_values=pixels, token_type_ids=images)


# --- the table in the docs ------------------------------------------------------------------

INTRODUCTION = """# Model families

S²-Attn needs no code for a model family: it goes through transformers' two registries of attention
and mask functions. This page lists what was checked, with transformers {version}, by
`tests/attention/test_families.py`; it is written by
`python tests/attention/test_families.py --write`.

Each row is a tiny random model in float64 (where the family's code asks for float32, it is given
float64 as well). Its training output and the gradient of every parameter equal those of the stock
model under an explicit mask per head, up to the error shown, which is relative to the largest
number expected; the test allows {tolerance:.0e}. Moreover, for every row: evaluation is bit for
bit stock while S²-Attn is enabled, and training is after `remove()`; no token sees a later one;
rows padded on the left or on the right equal the rows alone; packed documents equal the documents
alone, or, where the last column says that the stock model's other layers mix them, the stock model
under the documents' mask.

Layers with a sliding window shorter than `max_position_embeddings`, with chunks, and those without
attention keep the stock path; `handle.skipped` counts them. Families that are not on this page may
work: after a training step, `handle.calls` tells whether S²-Attn ran.

## Supported: {supported}

| family | covered layers | not covered | attention | precision | max error | packed documents |
|---|---|---|---|---|---|---|
"""
REFUSED = """
Vision and audio towers and cross-attention are never covered. `sdpa` ignores Gemma 2's softcap, in
stock transformers as here; `eager` applies it. Image tokens that see each other (Gemma 3 with
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
        f"stock layers mix them: {family.packing}" if family.packing else "kept apart",
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

"""What is measured, as plain values: the page names what has no row yet. Loads no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

SECTIONS = ("exact", "attention", "step", "profile", "flex")
"""In order; `flex` is `exact` for FlexAttention, last because it compiles for every shape."""
BACKENDS = (
    "sdpa",
    "eager",
    "flex_attention",
    "flash_attention_2",
    "flash_attention_3",
    "flash_attention_4",
)
DTYPES = ("bfloat16", "float16", "float32")
ROWS = ("plain", "packed", "padded")
EXACT_HEADS = ((8, 8), (8, 2), (8, 1))


@dataclass(frozen=True)
class Size:
    """How large everything is: on a GPU, or tiny.

    Attributes:
        exact_tokens: of the rows compared with dense masks.
        lengths: tokens of attention alone; heads and head_dim are its shape.
        step_lengths: tokens of a training step; profile_lengths: of one that is profiled.
        model: fields of the Llama config; Llama 2 7B's but for a tiny run.
    """

    exact_tokens: int
    lengths: tuple[int, ...]
    heads: tuple[tuple[int, int], ...]
    head_dim: int
    step_lengths: tuple[int, ...]
    profile_lengths: tuple[int, ...]
    model: tuple[tuple[str, int], ...]


GPU = Size(
    exact_tokens=1000,
    lengths=(8192, 16384, 32768, 65536, 131072),
    heads=((32, 32), (32, 8)),
    head_dim=128,
    step_lengths=(8192, 16384, 32768, 65536, 100_000),
    profile_lengths=(8192, 32768),
    model=(
        ("vocab_size", 32000),
        ("hidden_size", 4096),
        ("intermediate_size", 11008),
        ("num_hidden_layers", 32),
        ("num_attention_heads", 32),
        ("num_key_value_heads", 32),
    ),
)
TINY = Size(
    exact_tokens=60,
    lengths=(256,),
    heads=((4, 4), (4, 2)),
    head_dim=16,
    step_lengths=(64,),
    profile_lengths=(64,),
    model=(
        ("vocab_size", 97),
        ("hidden_size", 32),
        ("intermediate_size", 64),
        ("num_hidden_layers", 2),
        ("num_attention_heads", 4),
        ("num_key_value_heads", 4),
    ),
)


@dataclass(frozen=True)
class Exact:
    """One back end on one kind of rows, to be compared with dense masks in float64."""

    backend: str
    dtype: str
    rows: str
    heads: int
    kv_heads: int


@dataclass(frozen=True)
class Attention:
    """Attention alone: S² with every back end, full attention, the floor."""

    length: int
    heads: int
    kv_heads: int


@dataclass(frozen=True)
class Step:
    """A training step, or its profile."""

    length: int
    attention: str


Case = Exact | Attention | Step


def section_of(backend: str) -> str:
    """Where a back end is compared with dense masks."""
    return "flex" if backend == "flex_attention" else "exact"


def cases(section: str, size: Size) -> Iterator[Case]:
    """Every case of a section; flash kernels take 16 bits only."""
    if section in ("exact", "flex"):
        for dtype, backend, rows, heads in product(DTYPES, BACKENDS, ROWS, EXACT_HEADS):
            if section_of(backend) == section and not (
                dtype == "float32" and backend.startswith("flash")
            ):
                yield Exact(backend, dtype, rows, *heads)
    elif section == "attention":
        for length, heads in product(size.lengths, size.heads):
            yield Attention(length, *heads)
    else:
        lengths = size.step_lengths if section == "step" else size.profile_lengths
        for length, attention in product(lengths, ("s2", "full")):
            yield Step(length, attention)


def key(section: str, case: Case) -> dict[str, Any]:
    """What a row of results is found by."""
    return {"section": section, **asdict(case)}


def same(row: dict[str, Any], key: dict[str, Any]) -> bool:
    return all(row.get(name) == value for name, value in key.items())


def find(rows: list[dict[str, Any]], key: dict[str, Any]) -> dict[str, Any]:
    """The last row of a case; empty where there is none."""
    return next((row for row in reversed(rows) if same(row, key)), {})

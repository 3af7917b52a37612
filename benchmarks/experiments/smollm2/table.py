"""One table of the rows under OUT_DIR/eval.

    python -m benchmarks.experiments.smollm2.table OUT_DIR

Reads what `longlora eval` wrote, one JSON file a row (`make smollm2` names them), and
prints perplexity by position as Markdown; the same goes to OUT_DIR/table.md. Bucket `a–b` holds
the tokens that have a to b tokens before them in the text.

The row `windows` reads the same text through overlapping windows of the original context. Its
buckets come from the token losses beside it, so that every column of the table is about the very
same tokens: it shows how hard each part of the text is for a model that never leaves its context.
"""

from __future__ import annotations

import json
import math
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

UNSCALED, WINDOWS, TRAINED = "unscaled", "windows", "-trained"


def label(name: str, row: dict[str, Any]) -> str:
    """What the table calls a row file."""
    if name == UNSCALED:
        return "unscaled"
    if name == WINDOWS:
        return f"unscaled, windows of {row['length']}, stride {row['stride']}"
    if name.endswith(TRAINED):
        return f"{name.removesuffix(TRAINED)}, **trained**"
    return f"{name}, untrained"


def rank(name: str) -> tuple[int, str]:
    """Order of the table: unscaled, presets by name, trained ones, the windows."""
    if name == UNSCALED:
        return 0, name
    if name == WINDOWS:
        return 3, name
    return (2 if name.endswith(TRAINED) else 1), name


def by_place(tokens: Path, row: dict[str, Any], edges: list[int]) -> list[float]:
    """Perplexity between `edges` of the tokens' places in the text, not in their windows."""
    tensors = load_file(tokens)
    losses = tensors[f"{row['model']}/{row['length']}/nll"].astype(np.float64)
    places = tensors["position"]
    return [
        math.exp(losses[(low < places) & (places <= high)].mean()) for low, high in pairwise(edges)
    ]


def table(folder: Path) -> str:
    """The Markdown table of all row files in `folder`.

    Raises:
        ValueError: there is none, or they do not measure the same tokens at the same positions.
    """
    rows = {path.stem: json.loads(path.read_text())[0] for path in sorted(folder.glob("*.json"))}
    whole = [row for name, row in rows.items() if name != WINDOWS]
    if not whole:
        raise ValueError(f"no rows in {folder}: run make smollm2")
    found = {
        (row["data_digest"], tuple(b["to"] for b in row["buckets"]), row["tokens"], row["dtype"])
        for row in whole
    }
    if len(found) > 1:
        raise ValueError(
            f"the rows in {folder} are not about the same tokens; remove it and run make smollm2"
        )
    edges = [0, *(bucket["to"] for bucket in whole[0]["buckets"])]
    heads = [f"{low}–{high}" for low, high in pairwise(edges)]
    lines = [
        " | ".join(["| RoPE", *heads, "all", "seconds |"]),
        "|---" * (len(heads) + 3) + "|",
    ]
    for name in sorted(rows, key=rank):
        row = rows[name]
        if name == WINDOWS:
            values = by_place(folder / f"{name}.safetensors", row, edges)
        else:
            values = [bucket["perplexity"] for bucket in row["buckets"]]
        cells = [f"{value:.2f}" for value in (*values, row["perplexity"])]
        lines.append(" | ".join([f"| {label(name, row)}", *cells, f"{row['seconds']:.0f} |"]))
    first = whole[0]
    lines.append(
        f"\n{first['tokens']} tokens, each scored once, full attention, {first['dtype']}, "
        f"{first['device']}."
    )
    return "\n".join(lines) + "\n"


def main(out: Path) -> None:
    try:
        text = table(out / "eval")
    except (OSError, ValueError) as error:
        sys.exit(f"table.py: {error}")
    (out / "table.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

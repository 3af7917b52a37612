"""The picture of which token sees which, drawn from the segments that the kernels are given."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

PICTURE = Path(__file__).resolve().parent / "explanation" / "s2-attention.png"
TOKENS, GROUP = 16, 8
PACKED = ((0, 10), (10, 6))
"""(first token, tokens) of the two documents in the packed row."""


def panels() -> list[tuple[str, tuple[tuple[int, int], ...], int]]:
    """(title, documents, shift) of each panel; the shifts are those the real pattern gives."""
    from longlora_plugin.attention.layout import S2, head_runs

    plain, shifted = head_runs(S2, 2, 2, GROUP)
    whole = ((0, TOKENS),)
    return [
        ("plain heads", whole, plain.shift),
        ("shifted heads", whole, shifted.shift),
        ("plain heads, packed row", PACKED, plain.shift),
        ("shifted heads, packed row", PACKED, shifted.shift),
    ]


def mask(documents: tuple[tuple[int, int], ...], shift: int) -> list[list[bool]]:
    """Which token (column) a token (row) sees, by the segments that the kernels are given."""
    from longlora_plugin.attention.layout import segments

    seen = [[False] * TOKENS for _ in range(TOKENS)]
    for start, size in segments(documents, GROUP, shift, 0):
        for row in range(start, start + size):
            for column in range(start, row + 1):
                seen[row][column] = True
    return seen


def fingerprint() -> str:
    """Of what the picture shows; stored in the file."""
    content = [(title, mask(documents, shift)) for title, documents, shift in panels()]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def draw(path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.colors import to_rgb

    figure, axes = pyplot.subplots(1, 4, figsize=(15, 4.3), layout="constrained")
    colours = [to_rgb("#3b6fb6"), to_rgb("#d9822b")]
    for axis, (title, documents, shift) in zip(axes, panels(), strict=True):
        image = [[to_rgb("#f4f4f4")] * TOKENS for _ in range(TOKENS)]
        for row, seen in enumerate(mask(documents, shift)):
            owner = sum(row >= start for start, _ in documents) - 1
            for column, yes in enumerate(seen):
                if yes:
                    image[row][column] = colours[owner]
        axis.imshow(image)
        axis.set_title(title)
        axis.set_xticks(range(0, TOKENS, 4))
        axis.set_yticks(range(0, TOKENS, 4))
        axis.set_xticks([x - 0.5 for x in range(TOKENS + 1)], minor=True)
        axis.set_yticks([y - 0.5 for y in range(TOKENS + 1)], minor=True)
        axis.grid(which="minor", color="white", linewidth=1)
        axis.tick_params(which="minor", length=0)
        axis.set_xlabel("sees token")
    axes[0].set_ylabel("token")
    figure.suptitle(
        f"Which token sees which: {TOKENS} tokens, groups of {GROUP}; colours are documents"
    )
    figure.savefig(path, dpi=110, metadata={"Description": fingerprint()})
    pyplot.close(figure)

"""Which tokens a sliding window reads and which of them it scores: pure index arithmetic.

A document of T tokens is read through windows of L tokens that start at 0, S, 2S, … (S: stride)
and never leave the document. Score modes:

- `new`: a window scores the tokens that no window before it has scored, so that every token but
  the document's first is scored exactly once, having seen at least L − S tokens (fewer only where
  the document starts). The last window ends with the document and may be shorter.
- `all`: every window of exactly L tokens scores all its tokens but the first, so that a token is
  scored in several windows, half of them early in the window. This is the average of the original
  LongLoRA script (S = 256), except that it also drops the last window and joins all documents.

A position is the number of tokens of the window that a scored token has seen: 1 … L − 1, and L
where the stride is the length (see `sliding_windows`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from longlora_plugin.evaluation.options import ScoreMode


@dataclass(frozen=True)
class Window:
    """Tokens `start` … `end` − 1 of one document; those from `scored_from` on are scored.

    Attributes:
        document: index of the document.
        start: first token read.
        end: one past the last token read.
        scored_from: first token scored, above `start`: the first token of a window has no context.
        new_from: first token that no window before reads with context; `scored_from` in mode `new`.
    """

    document: int
    start: int
    end: int
    scored_from: int
    new_from: int

    @property
    def read(self) -> int:
        """Tokens read."""
        return self.end - self.start

    @property
    def scored(self) -> int:
        """Tokens scored."""
        return self.end - self.scored_from


def sliding_windows(
    document_lengths: Sequence[int], length: int, stride: int, score: ScoreMode = "new"
) -> list[Window]:
    """The windows over documents of the given numbers of tokens, in reading order.

    With stride = length and `new`, a window also reads the last token of the window before it:
    otherwise its own first token could not be scored.

    Raises:
        ValueError: length is below 2, or the stride is not in 1 … length.
    """
    if length < 2:
        raise ValueError(f"length {length} is too short: a window needs at least 2 tokens")
    if not 1 <= stride <= length:
        raise ValueError(
            f"stride {stride} does not go with length {length}: a larger stride than the length "
            f"would leave tokens out. Write a stride of 1 to {length}"
        )
    windows = []
    for document, tokens in enumerate(document_lengths):
        scored_until = 1
        for start in range(0, tokens if tokens > 1 else 0, stride):
            end = min(start + length, tokens)
            if score == "all":
                if end - start < length:
                    break
                windows.append(
                    Window(document, start, end, start + 1, max(start + 1, scored_until))
                )
            else:
                start = min(start, scored_until - 1)
                windows.append(Window(document, start, end, scored_until, scored_until))
            scored_until = end
            if end == tokens:
                break
    return windows


def default_bucket_edges(length: int, base_context: int | None = None) -> list[int]:
    """Edges of position buckets, 0 … length: two to a doubling, from 1/32 of the length on.

    Early positions differ most, late ones are the question, so a logarithmic scale serves both.
    The original context is always an edge where it lies inside the window.
    """
    edges = {0, length}
    edge = length
    while edge > max(1, length // 32):
        edges |= {edge // 2, edge * 3 // 4}
        edge //= 2
    if base_context is not None and 0 < base_context < length:
        edges.add(base_context)
    return sorted(edges)


def bucket_edges_for(
    length: int, edges: Sequence[int], base_context: int | None = None
) -> list[int]:
    """Edges of the position buckets of windows of `length` tokens.

    Args:
        edges: in tokens; those inside the window are used, 0 and the length are added. Empty for
            `default_bucket_edges`.

    Raises:
        ValueError: the edges make no sense.
    """
    if not edges:
        return default_bucket_edges(length, base_context)
    if edges[0] < 0 or list(edges) != sorted(set(edges)):
        raise ValueError(
            f"bucket edges {', '.join(map(str, edges))} must rise from 0 on, for example 0,256,512"
        )
    return sorted({0, length, *(edge for edge in edges if edge < length)})


def default_lengths(base_context: int, target_context: int) -> list[int]:
    """Lengths to measure: the original context, its doublings, and the target context."""
    lengths = {target_context}
    length = base_context
    while length < target_context:
        lengths.add(length)
        length *= 2
    return sorted(lengths)

"""What keeps a pair out: evidence that is not in the document, and near-duplicates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from longlora_plugin.longqa.optional import require
from longlora_plugin.longqa.scripts import width

SHORTEST_EVIDENCE = 8
"""Width without space (`scripts.width`) below which a quote is found anywhere by chance."""

SIMILAR = 0.8
"""Default Jaccard similarity of 5-character shingles from which two pairs count as the same."""

SAME_DOCUMENT = 0.8
"""Similarity from which two documents count as one: another edition, or another format."""

_SHINGLE = 5
_PERMUTATIONS = 128


def has_evidence(quotes: Sequence[str], text: str, edits: int = 0) -> bool:
    """Whether there is a quote and every quote is in `text`; white space counts as one space.

    Args:
        edits: characters that may differ (Levenshtein distance to the best place in `text`).
    """
    flat = " ".join(text.split())
    found = [" ".join(quote.split()) for quote in quotes]
    return bool(found) and all(
        width(quote.replace(" ", "")) >= SHORTEST_EVIDENCE and _is_in(quote, flat, edits)
        for quote in found
    )


def _is_in(quote: str, text: str, edits: int) -> bool:
    if quote in text:
        return True
    if edits == 0:
        return False
    require("rapidfuzz", "--evidence-edits")
    from rapidfuzz.distance import Levenshtein
    from rapidfuzz.fuzz import partial_ratio_alignment

    place = partial_ratio_alignment(quote, text)
    if place is None or len(quote) > len(text) + edits:
        return False
    # The alignment finds the place by another measure, so its ends may be off by a few characters.
    starts = range(max(0, place.dest_start - edits), place.dest_start + edits + 1)
    lengths = range(max(1, len(quote) - edits), len(quote) + edits + 1)
    return any(
        Levenshtein.distance(quote, text[start : start + length], score_cutoff=edits) <= edits
        for start in starts
        for length in lengths
    )


class NearDuplicates:
    """Finds earlier texts that say nearly the same: MinHash candidates, then exact Jaccard.

    Args:
        similar: Jaccard similarity from which two texts are the same; above 1 switches it off.
        sample: keep one shingle in this many; for long texts, to be fast.
    """

    def __init__(self, similar: float = SIMILAR, sample: int = 1) -> None:
        self.similar = similar
        self.sample = sample
        self._kept: dict[str, frozenset[int]] = {}
        self._index: Any = None
        if similar <= 1:
            datasketch = require("datasketch", "finding near-duplicates")
            # Candidates from a lower bar: MinHash only estimates, and the check after it is exact.
            self._index = datasketch.MinHashLSH(max(0.1, similar - 0.2), _PERMUTATIONS)

    def repeats(self, key: str, text: str) -> str | None:
        """Key of an earlier text that `text` nearly repeats; None: now `text` is one, as `key`."""
        if self._index is None:
            return None
        shingles = self._shingles(text)
        sketch = _minhash(shingles)
        for earlier in sorted(self._index.query(sketch)):
            other = self._kept[earlier]
            if len(shingles & other) >= self.similar * len(shingles | other):
                return str(earlier)
        self._kept[key] = shingles
        self._index.insert(key, sketch)
        return None

    def _shingles(self, text: str) -> frozenset[int]:
        from zlib import crc32

        flat = " ".join(text.casefold().split())
        hashed = (
            crc32(flat[i : i + _SHINGLE].encode()) for i in range(max(1, len(flat) - _SHINGLE + 1))
        )
        return frozenset(value for value in hashed if value % self.sample == 0)


def _minhash(shingles: frozenset[int]) -> Any:
    from datasketch import MinHash

    # The shingles are hashes already; MinHash only permutes them.
    sketch = MinHash(_PERMUTATIONS, hashfunc=int)
    sketch.update_batch(sorted(shingles))
    return sketch

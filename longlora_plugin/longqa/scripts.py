"""What differs between scripts: where sentences end, what a word is, how lines are joined.

Chinese, Japanese, Thai and their like put no spaces between words; a Han character says as much as
two or three letters; Thai marks the end of a sentence by a space alone. Lengths are therefore
measured as widths, and what stands for a word is a run of characters where there are no words.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from itertools import pairwise

import regex

from longlora_plugin.longqa.optional import require

WIDE = 3
"""Letters that one Han, Kana or Hangul character counts for in the length of a sentence."""

_UNMARKED = r"\p{Thai}\p{Lao}"
_SPACELESS = rf"\p{{Han}}\p{{Hiragana}}\p{{Katakana}}\p{{Khmer}}\p{{Myanmar}}{_UNMARKED}"
_NO_SPACE_BETWEEN = regex.compile(rf"[{_SPACELESS}\u3000-\u303f\uff00-\uffef]")
_WORD = regex.compile(rf"[{_SPACELESS}]+|[\p{{L}}\p{{M}}\p{{N}}_--{_SPACELESS}]+", regex.V1)
_UNMARKED_SPACE = regex.compile(rf"(?<=[{_UNMARKED}ๆฯ])[ \t]+(?=[{_UNMARKED}])")
_CLOSING = r"[\"'”’»)\]」』）】》]*"
_MARK = rf"[。！？｡।॥؟۔።။]{_CLOSING}"
_SURE_END = regex.compile(rf"(?:\w{{5}}[.!?]{_CLOSING}\s+|{_MARK}\s*)")
_END_BEFORE_DIGIT = regex.compile(rf"{_MARK}(?=\d)")
_OPENED, _CLOSED = frozenset("“「『（《【«"), frozenset("”」』）》】»")
_SHORTEST_UNMARKED = 40
# The segmenter takes time with the square of a paragraph's length.
_LONGEST_PIECE = 2000


def width(text: str, wide: int = WIDE) -> int:
    """Length of `text` with `wide` for each character of a wide script, 1 for any other."""
    return sum(wide if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)


def share_of_letters(text: str) -> float:
    """Share of letters, of their marks and of white space; a wide letter weighs as in `width`."""
    weights = [
        (width(char) if kind == "L" else 1, kind in "LMZ" or char.isspace())
        for char in text
        for kind in [unicodedata.category(char)[0]]
    ]
    return sum(weight for weight, counts in weights if counts) / max(1, sum(w for w, _ in weights))


def terms(text: str) -> Iterator[str]:
    """What a question can name as a word: words, or all short runs where there are no words."""
    for match in _WORD.finditer(text):
        word = match.group()
        if not _NO_SPACE_BETWEEN.match(word):
            yield word
            continue
        run = 4 if width(word[0]) == WIDE else 8
        yield from (word[at : at + run] for at in range(len(word) - run + 1))


def join_lines(lines: Sequence[str]) -> str:
    """Lines of one paragraph as one line, with a space only where the script has spaces."""
    joined = list(lines[:1])
    for before, line in pairwise(lines):
        spaceless = _NO_SPACE_BETWEEN.match(before[-1:]) and _NO_SPACE_BETWEEN.match(line)
        joined += [line] if spaceless else [" ", line]
    return "".join(joined)


def sentences(text: str, language: str = "en") -> list[str]:
    """Sentences of `text`, each verbatim.

    Args:
        language: ISO 639 code; decides abbreviations. The marks that end a sentence are known for
            every script.
    """
    segment = require("sentencex", "finding sentences").segment
    found: list[str] = []
    for piece in _pieces(text):
        parts = segment(language, piece) if len(piece) <= 2 * _LONGEST_PIECE else [piece]
        for part in (each for joined in parts for each in _cut_before_digits(joined)):
            found += _unmarked(part) if _UNMARKED_SPACE.search(part) else [part]
    return [stripped for part in found if (stripped := part.strip())]


def _pieces(text: str) -> Iterator[str]:
    """Paragraphs; long ones cut where a sentence surely ends."""
    for paragraph in regex.split(r"\n{2,}", text):
        start = 0
        while len(paragraph) - start > _LONGEST_PIECE:
            until = start + _LONGEST_PIECE
            ends = [match.end() for match in _SURE_END.finditer(paragraph, start, until)]
            if not ends:
                later = _SURE_END.search(paragraph, until - 10)
                ends = [later.end() if later else len(paragraph)]
            yield paragraph[start : ends[-1]]
            start = ends[-1]
        yield paragraph[start:]


def _cut_before_digits(text: str) -> Iterator[str]:
    """The sentences that the segmenter joins where the later one begins with a digit."""
    start = 0
    for match in _END_BEFORE_DIGIT.finditer(text):
        head = text[start : match.end()]
        if sum(char in _OPENED for char in head) <= sum(char in _CLOSED for char in head):
            yield head
            start = match.end()
    yield text[start:]


def _unmarked(text: str) -> Iterator[str]:
    """Phrases between spaces, joined until they are as long as a sentence."""
    start = 0
    for match in _UNMARKED_SPACE.finditer(text):
        if match.start() - start >= _SHORTEST_UNMARKED:
            yield text[start : match.start()]
            start = match.end()
    yield text[start:]

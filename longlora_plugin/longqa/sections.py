"""Sections, sentences and windows: a document cut to the context, never inside a sentence.

A document that fits is one window. A longer one is packed section by section, in order, into as few
windows as whole sections allow. Only a section that is alone longer than the budget is divided: at
paragraphs, where those do not fit at sentences, and no further: a sentence that does not fit by
itself is left out and counted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from longlora_plugin.longqa.documents import Document
from longlora_plugin.longqa.scripts import sentences

Count = Callable[[Sequence[str]], list[int]]
"""Tokens of each text, without special tokens."""

SMALLEST_SECTION = 200
"""Sections shorter than this many characters (a heading alone, say) join the next one."""

_PLAIN_HEADING = re.compile(
    r"""
    (?:(?i:chapter|book|part|act|scene|section|appendix|letter|canto|volume)\b[^\n]{0,70}
      | 第[〇一二三四五六七八九十百\d]{1,6}[章回節节部卷篇話话][^\n。]{0,40}
      | (?:제\ ?\d+\ ?[장부편화]|บทที่\ ?[\d๐-๙]+|अध्याय\b|الفصل\b)[^\n]{0,60}
      | \d{1,2}(?:\.\d{1,2})*\.?\ +[A-Z][^\n]{0,70}(?<![.,;:])
      | [IVXLC]{1,7}\.?
      | (?=[^\n]*[A-Z]{3})[^a-z\n]{3,60}
    )""",
    re.VERBOSE,
)


@dataclass(frozen=True)
class Window:
    """What one row has of a document.

    Attributes:
        index: 0, 1, … in reading order.
        sections: whole sections, or parts of one that is too long.
        text: the sections with an empty line between them.
        tokens: tokens of `text`.
    """

    index: int
    sections: tuple[str, ...]
    text: str
    tokens: int


def split_sections(document: Document) -> list[str]:
    """The sections of a document, in order; together they hold all its text."""
    text = document.text
    starts = document.breaks
    if not starts and document.style == "plain":
        starts = tuple(_plain_headings(text))
    sections: list[str] = []
    pending = ""
    for start, end in pairwise(sorted({0, *starts, len(text)})):
        part = text[start:end].strip("\n")
        if not part.strip():
            continue
        pending = f"{pending}\n\n{part}" if pending else part
        if len(pending) >= SMALLEST_SECTION:
            sections.append(pending)
            pending = ""
    if pending:
        short = [sections.pop(), pending] if sections else [pending]
        sections.append("\n\n".join(short))
    return sections


def _plain_headings(text: str) -> Iterator[int]:
    for match in re.finditer(r"(?:\A|\n\n)([^\n]+)(?=\n\n)", text):
        if _PLAIN_HEADING.fullmatch(match.group(1).strip()):
            yield match.start(1)


def windows(
    document: Document, budget: int, count: Count, language: str = "en"
) -> tuple[list[Window], int]:
    """Cut a document into windows of at most `budget` tokens.

    Returns:
        The windows, and how many sentences were left out because one alone exceeds the budget.
    """
    sections = split_sections(document)
    whole = _window(0, sections, count)
    if whole.tokens <= budget:
        return [whole], 0
    pieces: list[tuple[str, int]] = []
    left_out = 0
    for section, tokens in zip(sections, count(sections), strict=True):
        if tokens <= budget:
            pieces.append((section, tokens))
            continue
        parts, lost = _divide(section, budget, count, language)
        pieces += parts
        left_out += lost
    found: list[Window] = []
    at = 0
    while at < len(pieces):
        end, total = at, 0
        while end < len(pieces) and total + pieces[end][1] <= budget:
            total += pieces[end][1]
            end += 1
        # Tokens do not add up exactly where texts meet, so what was packed is measured.
        window = _window(len(found), [section for section, _ in pieces[at:end]], count)
        while window.tokens > budget and end > at + 1:
            end -= 1
            window = _window(len(found), [section for section, _ in pieces[at:end]], count)
        if window.tokens <= budget:
            found.append(window)
        else:
            left_out += len(sentences(window.text, language))
        at = end
    return found, left_out


def _window(index: int, sections: Sequence[str], count: Count) -> Window:
    text = "\n\n".join(sections)
    return Window(index, tuple(sections), text, count([text])[0])


def _divide(
    section: str, budget: int, count: Count, language: str
) -> tuple[list[tuple[str, int]], int]:
    """Divide one section at paragraphs, and a paragraph that is too long at sentences."""
    atoms: list[tuple[str, int, str]] = []
    left_out = 0
    paragraphs = [part for part in re.split(r"\n{2,}", section) if part.strip()]
    for paragraph, tokens in zip(paragraphs, count(paragraphs), strict=True):
        if tokens <= budget:
            atoms.append((paragraph, tokens, "\n\n"))
            continue
        inner = sentences(paragraph, language)
        end = 0
        for sentence, size in zip(inner, count(inner), strict=True):
            start = paragraph.index(sentence, end)
            joint = paragraph[end:start] if end else "\n\n"
            end = start + len(sentence)
            if size <= budget:
                atoms.append((sentence, size, joint))
            else:
                left_out += 1
    # Tokens do not add up exactly where texts meet: measure, and pack less where it is too much.
    limit = budget
    while True:
        texts = _pack(atoms, limit)
        sizes = count(texts)
        if not texts or max(sizes) <= budget:
            break
        limit = min(limit - 1, limit * 31 // 32)
    return list(zip(texts, sizes, strict=True)), left_out


def _pack(atoms: Sequence[tuple[str, int, str]], limit: int) -> list[str]:
    """Join neighbours while their tokens, plus two where they meet, stay within `limit`."""
    texts: list[str] = []
    running, total = "", 0
    for text, tokens, joint in atoms:
        if running and total + tokens + 2 > limit:
            texts.append(running)
            running, total = "", 0
        running = f"{running}{joint}{text}" if running else text
        total += tokens + 2
    return [*texts, running] if running else texts

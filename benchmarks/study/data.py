"""What the study trains on and measures on: windows of books, with and without a passkey.

A *passkey* is `DIGITS` tokens in a row, the i-th of them one of `VALUES` ordinary words that stand
for the i-th digit only; it is written somewhere in a window of text, which is rid of these words
otherwise. Later, the i-th of `DIGITS` cue tokens asks for the i-th digit, and the model shall
predict it. The answers do not stand in the window, only the labels have them: whoever is asked
again cannot copy an earlier answer, the digit has to be looked up where it is written, or guessed
(1 in 10). Digits are words that books use, and not the rarest tokens, since the bundled model
hardly tells the vectors of those apart: with them it learned nothing in 200 steps, with these all.

Shapes: B windows a batch, N tokens a window, W windows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DIGITS = 4
VALUES = 10

TOKENS_A_QUESTION = 16
"""A training window of N tokens asks N / 16 times for a digit."""

COMMON = 500
"""Rank by frequency of the most common token that is a digit."""

IGNORED = -100
"""Label of a token that gives no loss."""


@dataclass(frozen=True)
class Alphabet:
    """Tokens that passkeys are made of and asked for with.

    Attributes:
        cues: [DIGITS]; the i-th asks for the i-th digit.
        digits: [DIGITS, VALUES].
        filler: one token, the most common one; it replaces the text's own digits.
    """

    cues: Tensor
    digits: Tensor
    filler: Tensor

    @classmethod
    def of(cls, documents: list[Tensor], vocabulary: int) -> Alphabet:
        """Cues are the tokens that the documents use least, digits those from rank `COMMON` on.

        PAD, BOS and EOS are neither: they mean something already.
        """
        counts = torch.bincount(torch.cat(documents), minlength=vocabulary)
        counts[:3] = counts.max()
        by_frequency = counts.argsort(descending=True, stable=True)
        words = by_frequency[COMMON : COMMON + DIGITS * VALUES]
        shuffled = words[torch.randperm(len(words), generator=torch.Generator().manual_seed(0))]
        return cls(by_frequency[-DIGITS:], shuffled.view(DIGITS, VALUES), by_frequency[3])

    def draw(self, generator: torch.Generator) -> Tensor:
        """A passkey [DIGITS]."""
        values = torch.randint(VALUES, (DIGITS,), generator=generator)
        return self.digits[torch.arange(DIGITS), values]


def encode(tokenizer: Any, path: Path) -> list[Tensor]:
    """The documents of a JSON Lines file, each as token ids between BOS and EOS."""
    with path.open(encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    return [torch.tensor([*tokenizer(text).input_ids, tokenizer.eos_token_id]) for text in texts]


def cut(documents: list[Tensor], length: int, offset: int = 0) -> Tensor:
    """All whole windows of the documents, one after the other, [W, N]; no window spans two."""
    return torch.cat(
        [
            document[offset:].unfold(0, length, length)
            for document in documents
            if len(document) > length + offset
        ]
    )


def book_batches(documents: list[Tensor], length: int, batch: int, seed: int) -> Iterator[Tensor]:
    """Shuffled windows [B, N] for ever; each epoch cuts the books anew at a random offset."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        offset = int(torch.randint(length, (1,), generator=generator))
        windows = cut(documents, length, offset)
        order = torch.randperm(len(windows), generator=generator)
        yield from windows[order[: len(windows) // batch * batch]].split(batch)


def plant(windows: Tensor, alphabet: Alphabet, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A passkey in each of `windows` [W, N], asked for at random later places.

    Returns:
        ids [W, N] and labels [W, N]: the token itself, `IGNORED` where it is random, and after a
        cue the digit that was asked for, whatever token stands there.
    """
    ids = torch.where(torch.isin(windows, alphabet.digits), alphabet.filler, windows)
    labels = ids.clone()
    length = windows.shape[1]
    for row in range(len(windows)):
        key = alphabet.draw(generator)
        start = int(torch.randint(1, length // 2, (1,), generator=generator))
        end = start + DIGITS
        ids[row, start:end] = key
        labels[row, start:end] = IGNORED
        # Every second token at most, so that a cue never stands where an answer is due.
        free = torch.arange(end, length - 1, 2)
        places = free[torch.randperm(len(free), generator=generator)[: length // TOKENS_A_QUESTION]]
        which = torch.randint(DIGITS, places.shape, generator=generator)
        ids[row, places] = alphabet.cues[which]
        labels[row, places] = IGNORED
        labels[row, places + 1] = key[which]
    return ids, labels


def passkey_test(
    windows: Tensor, alphabet: Alphabet, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Windows [W, N] with a passkey anywhere and all its digits asked for at the end.

    Returns:
        ids [W, N]; keys [W, DIGITS], the answers after each of the last `DIGITS` tokens; where
        each key begins [W].
    """
    ids = torch.where(torch.isin(windows, alphabet.digits), alphabet.filler, windows)
    keys = torch.stack([alphabet.draw(generator) for _ in range(len(windows))])
    starts = torch.randint(1, windows.shape[1] - 2 * DIGITS, (len(windows),), generator=generator)
    for row, (start, key) in enumerate(zip(starts.tolist(), keys, strict=True)):
        ids[row, start : start + DIGITS] = key
    ids[:, -DIGITS:] = alphabet.cues
    return ids, keys, starts


@dataclass(frozen=True)
class Books:
    """Tokens of the training books and of the held-out ones, and the tokens of passkeys."""

    train: list[Tensor]
    held_out: list[Tensor]
    alphabet: Alphabet | None = None

    @classmethod
    def read(cls, tokenizer: Any, text_dir: Path) -> Books:
        train = encode(tokenizer, text_dir / "train.jsonl")
        held_out = encode(tokenizer, text_dir / "heldout.jsonl")
        return cls(train, held_out, Alphabet.of(train, len(tokenizer)))

    def held_out_windows(self, length: int, count: int) -> Tensor:
        """`count` windows spread evenly over the held-out books, always the same, [count, N]."""
        windows = cut(self.held_out, length)
        if count > len(windows):
            raise ValueError(f"the held-out books have {len(windows)} windows, not {count}")
        return windows[torch.linspace(0, len(windows) - 1, count).long()]

"""What ends RULER's generators where not even their shortest text fits.

They start from the shortest text they make. Where that is too long already, some draw texts
forever and swallow every exception, so that not even Ctrl-C ends them; while they look for the size
they still let one through.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

from longlora_plugin.evaluation.sweep import NotMeasurable

ANSWER_TOKENS = {"niah": 128, "ruler_cwe": 120, "ruler_vt": 30}
"""Tokens that the generators leave for the answer."""
FEWEST_FOR_FWE = 200
"""fwe draws from a word for every 50 tokens, and asks for the second to the fourth."""
EXAMPLE = 500
"""Tokens of the example that vt puts before its text, at most."""


class FittingTokenizer:
    """The tokenizer, for generators that ask it how long their texts are."""

    def __init__(self, tokenizer: Any, task: str, length: int) -> None:
        self._tokenizer, self._task, self._length = tokenizer, task, length
        if task == "ruler_fwe" and length < FEWEST_FOR_FWE:
            raise NotMeasurable(
                f"{task} at {length}: no row, it has no three words to ask for below "
                f"{FEWEST_FOR_FWE} tokens; give a longer length"
            )
        answer = next((n for name, n in ANSWER_TOKENS.items() if task.startswith(name)), None)
        self._limit: int | None = None
        if answer is not None:
            if length <= answer:
                raise NotMeasurable(
                    f"{task} at {length}: no row, {answer} tokens are for the answer alone; "
                    "give a longer length"
                )
            self._limit = (EXAMPLE if task == "ruler_vt" else length) - answer
        self._calls = 0
        self._most = 20_000 + length

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, text: str, *args: Any, **options: Any) -> Any:
        encoded = self._tokenizer(text, *args, **options)
        tokens = len(encoded.input_ids)
        if self._limit is not None and tokens > self._limit:
            raise self._does_not_fit(tokens)
        self._limit = None
        if self._task == "ruler_vt" and text.endswith("\n\n"):
            self._limit = self._length - ANSWER_TOKENS["ruler_vt"] - tokens
            if self._limit <= 0:
                raise self._does_not_fit(tokens)
        self._calls += 1
        if self._calls > self._most:
            encoded = type(encoded)({"input_ids": []})
        return encoded

    def _does_not_fit(self, tokens: int) -> NotMeasurable:
        return NotMeasurable(
            f"{self._task} at {self._length}: no row, its shortest text has {tokens} tokens in "
            "this tokenizer, and needs space for the answer; give a longer length"
        )

    def check(self) -> None:
        """Raise NotMeasurable where the generator would not have ended."""
        if self._calls > self._most:
            raise NotMeasurable(
                f"{self._task} at {self._length}: no row, its texts do not fit in this tokenizer; "
                "give a longer length"
            )


@contextlib.contextmanager
def fitting(task: str, length: int, tokenizer: Any) -> Iterator[None]:
    """Let RULER's generators have the model's own tokenizer object."""
    from lm_eval.tasks.ruler import common_utils

    wrapped = FittingTokenizer(tokenizer, task, length)
    loader = mock.Mock(from_pretrained=lambda *args, **options: wrapped)
    common_utils.get_tokenizer.cache_clear()
    with mock.patch.object(common_utils, "AutoTokenizer", loader):
        yield
    common_utils.get_tokenizer.cache_clear()
    wrapped.check()

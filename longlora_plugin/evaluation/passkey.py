"""Passkey retrieval: find a number that is hidden at some depth in a long filler text.

The test of LongLoRA, arXiv 2309.12307, section 4.2 and Figure 4, in our own words: a task line,
filler, a sentence that states a number, more filler, and a question whose answer is the number. The
quick look; `bench` has RULER, with several needles and distractors.

A prompt and its answer together have at most `length` tokens, and miss it by less than one filler
sentence: text is added by whole sentences, so that any tokenizer sees ordinary prose.
A trial follows from (seed, length, depth, its number) alone: the same for every model with the same
tokenizer, whatever else the run asks for. It is right where greedy decoding with a KV cache starts
with exactly the number.

Shapes: B prompts a batch, P tokens a prompt; prompts of one batch have one length, so that none is
padded and no mask is needed.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch

from longlora_plugin.evaluation.loading import LoadedModel, ModelSource
from longlora_plugin.evaluation.options import Depth, PasskeyOptions
from longlora_plugin.evaluation.perplexity import BATCH_TOKENS
from longlora_plugin.evaluation.processes import Processes
from longlora_plugin.evaluation.rows import PasskeyFigures
from longlora_plugin.evaluation.sweep import Cell, Experiment

TASK = "One line of the following text states a secret number. Look for it; you will be asked."
FILLER = (
    "Rain ran down the window all morning.",
    "A cart went by and the dog next door barked at it.",
    "Someone had left the kettle on the stove.",
    "The clock in the hall was a few minutes slow.",
    "Towards noon the wind turned and the clouds broke up.",
)
NEEDLE = "The secret number is {number}. Note it: {number} is the secret number."
QUESTION = "What is the secret number? The secret number is"

WORDING = " ".join((TASK, *FILLER, NEEDLE, QUESTION, *map(str, range(10))))
"""Everything a prompt is made of."""

DIGITS = 5
EXTRA_TOKENS = 2
"""Tokens generated beyond the number, to see whether it ends there."""


@dataclass(frozen=True)
class Trial:
    """One question.

    Attributes:
        prompt: token ids, ending right before the answer.
        number: the right answer, digits.
        tokens: of prompt and answer.
        depth: share of the filler before the needle.
    """

    prompt: list[int]
    number: str
    tokens: int
    depth: float


def build_trial(tokenizer: Any, length: int, depth: Depth, number: int, *, seed: int = 0) -> Trial:
    """Trial `number` of a cell of the grid.

    Args:
        tokenizer: a transformers tokenizer.
        length: tokens of prompt and answer at most.
        depth: share of the filler before the needle, 0 … 1, or `random`.

    Raises:
        ValueError: the prompt does not fit into `length` even without filler.
    """
    check_grid([length], [depth])
    draw = random.Random(f"{seed} {length} {depth} {number}")
    at = draw.random() if depth == "random" else float(depth)
    value = str(draw.randrange(10 ** (DIGITS - 1), 10**DIGITS))
    first_sentence = draw.randrange(len(FILLER))

    def prompt_with(fillers: int) -> str:
        lines = [FILLER[(first_sentence + index) % len(FILLER)] for index in range(fillers)]
        lines.insert(round(at * fillers), NEEDLE.format(number=value))
        return f"{TASK}\n{' '.join(lines)}\n{QUESTION}"

    def tokens_with(fillers: int) -> int:
        return len(_encode(tokenizer, f"{prompt_with(fillers)} {value}"))

    fillers = _most_that_fit(tokens_with, length)
    prompt = _encode(tokenizer, prompt_with(fillers))
    while prompt[-1] in tokenizer.all_special_ids:  # some end every text with one
        prompt.pop()
    return Trial(prompt, value, tokens_with(fillers), at)


def check_grid(lengths: Sequence[int], depths: Sequence[Depth]) -> None:
    """Refuse a grid that makes no sense.

    Raises:
        ValueError: says what was given and what is allowed.
    """
    for length in lengths:
        if length < 1:
            raise ValueError(f"length {length}: write a number of tokens, for example 4096")
    for depth in depths:
        if depth != "random" and not 0 <= float(depth) <= 1:
            share = f"; write {depth / 100:g} for {depth:g} %" if 1 < float(depth) <= 100 else ""
            raise ValueError(
                f"depth {depth:g}: a depth is a share of the text, 0 to 1, or random{share}"
            )


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, verbose=False)["input_ids"])


def _most_that_fit(tokens_with: Callable[[int], int], length: int) -> int:
    """Most filler sentences with which prompt and answer stay within `length` tokens."""
    empty, ten = tokens_with(0), tokens_with(10)
    if empty > length:
        raise ValueError(
            f"length {length} is too short for a passkey prompt: this tokenizer needs {empty} "
            f"tokens without any filler. Write a length of at least {empty}"
        )
    fillers = max(0, (length - empty) * 10 // max(1, ten - empty))
    while fillers and tokens_with(fillers) > length:
        fillers -= 1
    while tokens_with(fillers + 1) <= length:
        fillers += 1
    return fillers


def answer_trials(
    model: Any,
    tokenizer: Any,
    trials: Sequence[Trial],
    *,
    batch_size: int = 1,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[list[Trial], list[bool]]]:
    """Answer trials batch by batch, those with prompts of one length together."""
    by_length = sorted(trials, key=lambda trial: len(trial.prompt))
    for _, group in groupby(by_length, key=lambda trial: len(trial.prompt)):
        alike = list(group)
        for first in range(0, len(alike), batch_size):
            batch = alike[first : first + batch_size]
            yield batch, _answers(model, tokenizer, batch, device)


@torch.inference_mode()
def _answers(
    model: Any, tokenizer: Any, trials: Sequence[Trial], device: torch.device | str
) -> list[bool]:
    ids_BP = torch.tensor([trial.prompt for trial in trials], device=device)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    produced = model.generate(
        input_ids=ids_BP,
        attention_mask=torch.ones_like(ids_BP),
        max_new_tokens=max(each.tokens for each in trials) - ids_BP.shape[1] + EXTRA_TOKENS,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        use_cache=True,
        temperature=None,
        top_p=None,
        top_k=None,
        pad_token_id=pad,
    )
    answers = tokenizer.batch_decode(produced[:, ids_BP.shape[1] :], skip_special_tokens=True)
    return [is_exactly(answer, trial.number) for answer, trial in zip(answers, trials, strict=True)]


def is_exactly(answer: str, number: str) -> bool:
    """Whether an answer starts, after white space, with this number and not with a longer one.

    `12345,678`, `12345.6` and `12345th` are other numbers; `12345.` and `12345, or` are this one.
    """
    found = re.match(r"\s*(\d+)(?!\w|[^\w\s]\d)", answer)
    return found is not None and found.group(1) == number


class PasskeyGrid(Experiment):
    """How often a model finds the number, for every length and depth.

    Args:
        tokenizers: of each model, by label.
        options: `lengths` is not empty.

    Raises:
        ValueError: the grid makes no sense, or a length is too short for a prompt.
    """

    question = ("trials", "seed")

    def __init__(
        self, tokenizers: Mapping[str, Any], options: PasskeyOptions, processes: Processes
    ) -> None:
        check_grid(options.lengths, options.depths)
        self.options, self.processes = options, processes
        for tokenizer in tokenizers.values():
            for length in options.lengths:  # too short a length is an error before a model loads
                build_trial(tokenizer, length, options.depths[0], 0, seed=options.seed)
        self._tokens = {label: _encode(tokenizers[label], WORDING) for label in tokenizers}

    def cells(self) -> list[Cell]:
        return [
            {"length": length, "depth": depth}
            for length in sorted(set(self.options.lengths))
            for depth in dict.fromkeys(self.options.depths)
        ]

    def settings(self, source: ModelSource, cell: Cell) -> dict[str, Any]:
        return {
            **cell,
            "trials": self.options.trials,
            "seed": self.options.seed,
            "tokenizer": self._tokens[source.label],
        }

    def measure(
        self, model: LoadedModel, cell: Cell, progress: Callable[[int, int], None]
    ) -> PasskeyFigures:
        options = self.options
        trials = [
            build_trial(model.tokenizer, cell["length"], cell["depth"], number, seed=options.seed)
            for number in range(self.processes.rank, options.trials, self.processes.count)
        ]
        model.check_ids(max((max(trial.prompt) for trial in trials), default=0))
        answers: list[dict[str, Any]] = []
        batch_size = options.batch_size or max(1, BATCH_TOKENS // cell["length"])
        for batch, right in answer_trials(
            model.model, model.tokenizer, trials, batch_size=batch_size, device=model.device
        ):
            answers += [
                {"depth": round(trial.depth, 4), "tokens": trial.tokens, "right": answer}
                for trial, answer in zip(batch, right, strict=True)
            ]
            progress(len(batch), len(trials))
        from scipy.stats import binomtest

        answers = self.processes.gather(answers)
        correct = sum(answer["right"] for answer in answers)
        tokens = [answer["tokens"] for answer in answers]
        return {
            "accuracy": correct / options.trials,
            "correct": correct,
            "trials": options.trials,
            "ci95": list(binomtest(correct, options.trials).proportion_ci(method="wilson")),
            "chance": 10.0**-DIGITS,
            "seed": options.seed,
            "tokens_least": min(tokens),
            "tokens_most": max(tokens),
            "answers": answers,
        }

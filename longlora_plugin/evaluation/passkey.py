"""Passkey retrieval: find a number that is hidden at some depth in a long filler text.

The test of LongLoRA, arXiv 2309.12307, section 4.2 and Figure 4, in our own words: a task line,
filler, a sentence that states a number, more filler, and a question whose answer is the number.
With several needles each number belongs to a named box and one of them is asked for.

A prompt and its answer together have at most `length` tokens, and miss it by less than one filler
sentence: text is added by whole sentences, so that any tokenizer sees ordinary prose.
A trial follows from (seed, length, depth, needles, its number) alone: the same for every model with
the same tokenizer, whatever else the run asks for.

Two ways to score a trial:

- `generate`: greedy decoding with a KV cache; right where the answer starts with exactly the
  number.
- `likelihood`: right where the number is more likely than each of several others, the other needles
  among them. One pass over the prompt and short ones over the candidates; a model that cannot
  answer freely may still pass, and guessing is right in 1 of (distractors + 1) cases.

Shapes: B prompts a batch, P tokens of the longest (left-padded), A tokens of an answer.
"""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

BY = ("generate", "likelihood")
By = Literal["generate", "likelihood"]
Depth = float | Literal["random"]

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
BOX_NEEDLE = "The secret number of the {box} box is {number}. Note it: {box} is {number}."
BOX_QUESTION = "What is the secret number of the {box} box? The secret number of the {box} box is"
BOXES = (
    "red", "blue", "green", "black", "white", "brown", "yellow", "orange",
    "silver", "golden", "purple", "pink", "iron", "wooden", "paper", "glass",
)  # fmt: skip

WORDING = " ".join((TASK, *FILLER, NEEDLE, QUESTION, BOX_NEEDLE, BOX_QUESTION, *BOXES))
"""Everything a prompt is made of."""

DIGITS = 5
DISTRACTORS = 9
EXTRA_TOKENS = 2
"""Tokens generated beyond the number, to see whether its digits end there."""


@dataclass(frozen=True)
class Trial:
    """One question.

    Attributes:
        prompt: token ids, ending right before the answer.
        number: the right answer, digits.
        candidates: the right answer's token ids, then those of each distractor.
        depth: share of the filler that stands before the needle asked for.
    """

    prompt: list[int]
    number: str
    candidates: list[list[int]]
    depth: float

    @property
    def tokens(self) -> int:
        """Tokens of prompt and answer."""
        return len(self.prompt) + len(self.candidates[0])


def build_trial(
    tokenizer: Any,
    length: int,
    depth: Depth,
    number: int,
    *,
    needles: int = 1,
    digits: int = DIGITS,
    distractors: int = DISTRACTORS,
    seed: int = 0,
    answer_only: bool = False,
) -> Trial:
    """Trial `number` of a cell of the grid.

    Args:
        tokenizer: a transformers tokenizer.
        length: tokens of prompt and answer at most.
        depth: share of the filler before the needle, 0 … 1, or `random`.
        needles: hidden numbers, 1 … 16; the others stand anywhere.
        digits: digits of a number.
        distractors: wrong candidates for scoring by likelihood.
        answer_only: tokenize no distractor; the trial is the same.

    Raises:
        ValueError: the prompt does not fit into `length` even without filler.
    """
    check_grid([length], [depth], needles, digits, distractors)
    draw = random.Random(f"{seed} {length} {depth} {needles} {digits} {distractors} {number}")
    at = draw.random() if depth == "random" else float(depth)
    values = _different_numbers(draw, max(needles, distractors + 1), digits)
    boxes = draw.sample(BOXES, needles)
    depths = [at, *(draw.random() for _ in range(needles - 1))]
    if needles == 1:
        sentences, question = [NEEDLE.format(number=values[0])], QUESTION
    else:
        sentences = [
            BOX_NEEDLE.format(box=box, number=value)
            for box, value in zip(boxes, values, strict=False)
        ]
        question = BOX_QUESTION.format(box=boxes[0])
    first_sentence = draw.randrange(len(FILLER))

    def prompt_with(fillers: int) -> str:
        lines = [FILLER[(first_sentence + index) % len(FILLER)] for index in range(fillers)]
        # From the last place to the first, so that a place keeps its meaning.
        for place, sentence in sorted(
            ((round(share * fillers), text) for share, text in zip(depths, sentences, strict=True)),
            reverse=True,
        ):
            lines.insert(place, sentence)
        return f"{TASK}\n{' '.join(lines)}\n{question}"

    def tokens_with(fillers: int) -> int:
        return len(_encode(tokenizer, f"{prompt_with(fillers)} {values[0]}"))

    fillers = _most_that_fit(tokens_with, length)
    asked = values[: 1 if answer_only else distractors + 1]
    prompt, candidates = _split_answers(tokenizer, prompt_with(fillers), asked)
    return Trial(prompt, values[0], candidates, at)


def check_grid(
    lengths: Sequence[int],
    depths: Sequence[Depth],
    needles: int = 1,
    digits: int = DIGITS,
    distractors: int = DISTRACTORS,
) -> None:
    """Refuse a grid that makes no sense.

    Raises:
        ValueError: says what was given and what is allowed.
    """
    for length in lengths:
        if length < 1:
            raise ValueError(f"length {length}: write a number of tokens, for example 4096")
    for depth in depths:
        if depth != "random" and not 0 <= float(depth) <= 1:
            raise ValueError(
                f"depth {depth:g}: a depth is a share of the text, 0 to 1, or random; "
                f"write {float(depth) / 100:g} for {depth:g} %"
            )
    if not 1 <= needles <= len(BOXES):
        raise ValueError(f"{needles} needles: write 1 to {len(BOXES)}")
    if not 1 <= digits <= 18 or 9 * 10 ** (digits - 1) < max(needles, distractors + 1):
        raise ValueError(
            f"{digits} digits do not make {max(needles, distractors + 1)} different numbers; "
            f"write {DIGITS}"
        )
    if distractors < 1:
        raise ValueError(f"{distractors} distractors: write at least 1")


def _different_numbers(draw: random.Random, count: int, digits: int) -> list[str]:
    low = 10 ** (digits - 1)
    numbers: dict[str, None] = {}
    while len(numbers) < count:
        numbers[str(draw.randrange(low, 10 * low))] = None
    return list(numbers)


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


def _split_answers(
    tokenizer: Any, prompt: str, numbers: Sequence[str]
) -> tuple[list[int], list[list[int]]]:
    """Token ids of a prompt, and of each number that may follow it.

    A tokenizer may join the prompt's end with the answer's beginning; the prompt then ends where
    all its continuations still agree. Special tokens after a text (BERT-like) are dropped.
    """
    whole = [_encode(tokenizer, f"{prompt} {number}") for number in numbers]
    special = set(tokenizer.all_special_ids)
    for ids in whole:
        while ids and ids[-1] in special:
            ids.pop()
    agreed = _encode(tokenizer, prompt)
    while agreed and agreed[-1] in special:
        agreed.pop()
    shared = len(agreed)
    for ids in whole:
        shared = min(shared, _common(agreed, ids))
    return agreed[:shared], [ids[shared:] for ids in whole]


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    count = 0
    for one, other in zip(left, right, strict=False):
        if one != other:
            break
        count += 1
    return count


@torch.inference_mode()
def answers_by_generating(
    model: Any, tokenizer: Any, trials: Sequence[Trial], device: torch.device | str = "cpu"
) -> list[bool]:
    """Whether greedy decoding with a KV cache answers each trial with exactly its number."""
    ids, mask = _left_padded(tokenizer, trials, device)
    new_tokens = max(len(trial.candidates[0]) for trial in trials) + EXTRA_TOKENS
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    produced = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        use_cache=True,
        temperature=None,
        top_p=None,
        top_k=None,
        pad_token_id=pad,
    )
    answers = tokenizer.batch_decode(produced[:, ids.shape[1] :], skip_special_tokens=True)
    return [is_exactly(answer, trial.number) for answer, trial in zip(answers, trials, strict=True)]


def is_exactly(answer: str, number: str) -> bool:
    """Whether an answer starts, after white space, with this number and not with a longer one."""
    found = re.match(r"\s*(\d+)", answer)
    return found is not None and found.group(1) == number


def answers_by_likelihood(
    model: Any, tokenizer: Any, trials: Sequence[Trial], device: torch.device | str = "cpu"
) -> list[bool]:
    """Whether each trial's number has a higher log-likelihood than all its distractors."""
    scores_BC = candidate_likelihoods(model, tokenizer, trials, device)
    return (scores_BC[:, :1] > scores_BC[:, 1:]).all(1).tolist()


@torch.inference_mode()
def candidate_likelihoods(
    model: Any, tokenizer: Any, trials: Sequence[Trial], device: torch.device | str = "cpu"
) -> Tensor:
    """Log-likelihood in nats of each trial's candidates after its prompt, float32 [B, C]."""
    ids, mask = _left_padded(tokenizer, trials, device)
    places = (mask.cumsum(1) - 1).clamp_min(0)
    read = model(
        input_ids=ids, attention_mask=mask, position_ids=places, use_cache=True, logits_to_keep=1
    )
    first_BV = read.logits[:, -1].float().log_softmax(-1)
    following = places[:, -1:] + 1
    scores = []
    for index in range(len(trials[0].candidates)):
        answers = [trial.candidates[index] for trial in trials]
        total_B = first_BV.gather(1, torch.tensor([[a[0]] for a in answers], device=device))[:, 0]
        if (longest := max(map(len, answers))) > 1:
            fill = answers[0][0]
            answer_BA = torch.tensor(
                [answer + [fill] * (longest - len(answer)) for answer in answers], device=device
            )
            # Only the last tokens are padding, and only their own predictions see them.
            real_BA = torch.tensor(
                [[i < len(answer) for i in range(longest)] for answer in answers], device=device
            )
            cache, roll_back = _reusable(read.past_key_values, longest - 1)
            more = model(
                input_ids=answer_BA[:, :-1],
                attention_mask=torch.cat([mask, torch.ones_like(answer_BA[:, :-1])], 1),
                position_ids=following + torch.arange(longest - 1, device=device),
                past_key_values=cache,
                use_cache=True,
            )
            roll_back()
            log_BA = more.logits.float().log_softmax(-1)
            log_BA = log_BA.gather(2, answer_BA[:, 1:, None])[..., 0]
            total_B = total_B + (log_BA * real_BA[:, 1:]).sum(1)
        scores.append(total_B)
    return torch.stack(scores, 1)


def _reusable(cache: Any, added: int) -> tuple[Any, Callable[[], None]]:
    """A cache that may be written to, and what takes the `added` tokens away again.

    A sliding-window or recurrent cache forgets what it drops, so that one is copied.
    """
    sliding = getattr(cache, "is_sliding", None)
    if isinstance(sliding, list) and not any(sliding) and _is_plain(cache):
        return cache, lambda: cache.crop(-added)
    return copy.deepcopy(cache), lambda: None


def _is_plain(cache: Any) -> bool:
    from transformers import DynamicCache

    return type(cache) is DynamicCache and not any(getattr(cache, "is_linear", []) or [])


def _left_padded(
    tokenizer: Any, trials: Sequence[Trial], device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """Prompts as ids [B, P] and mask [B, P]; padding stands before a prompt."""
    longest = max(len(trial.prompt) for trial in trials)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    ids = [[pad] * (longest - len(trial.prompt)) + trial.prompt for trial in trials]
    mask = [[0] * (longest - len(trial.prompt)) + [1] * len(trial.prompt) for trial in trials]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def answer_trials(
    model: Any,
    tokenizer: Any,
    trials: Sequence[Trial],
    *,
    by: By = "generate",
    batch_size: int = 1,
    device: torch.device | str = "cpu",
) -> Iterator[list[bool]]:
    """Answer trials batch by batch; see the module docstring for `by`."""
    model.eval()
    answer = answers_by_generating if by == "generate" else answers_by_likelihood
    for first in range(0, len(trials), batch_size):
        yield answer(model, tokenizer, trials[first : first + batch_size], device)

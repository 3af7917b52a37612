"""Questions from held-out LongQA rows: the rows, their wrong answers, their token ids.

Prompt and answer are tokenized by Axolotl's own code for `type: alpaca`, so they are what the
recipe trains on.
"""

from __future__ import annotations

import json
import random
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DISTRACTORS = 3
LETTERS = ("order_of_events",)
NAMES = ("who_said", "fill_name")

Ids = list[int]


@dataclass(frozen=True)
class Row:
    """A row of the data file with what the build recorded about it.

    Attributes:
        name: of the row in the record.
        book: the file that its document was cut from.
        frame: what stands before and after the document in the instruction.
    """

    name: str
    task: str
    book: str
    document: str
    frame: tuple[str, str]
    answer: str

    def instruction(self, document: str) -> str:
        """The same question about `document`."""
        return f"{self.frame[0]}{document}{self.frame[1]}"


@dataclass(frozen=True)
class Question:
    """Token ids; `answers` holds the right answer, then the distractors."""

    row: Row
    prompt: Ids
    prompt_other: Ids
    answers: list[Ids]


# ---- answers as text ------------------------------------------------------------------------


def normalise(text: str) -> str:
    """`text` without case, outer quotes and punctuation, and with single spaces."""
    return re.sub(r"\s+", " ", text).casefold().strip(" “”\"'‘’.,;:!?-")


def is_exact(said: str, answer: str) -> bool:
    """Whether the two are the same, apart from what `normalise` removes."""
    return normalise(said) == normalise(answer)


def begins_with(said: str, answer: str) -> bool:
    """Whether `said` begins with the answer and does not go on inside its last word."""
    said, answer = normalise(said), normalise(answer)
    return said.startswith(answer) and not re.match(r"\w", said[len(answer) :])


# ---- rows -----------------------------------------------------------------------------------


def split_instruction(instruction: str, kind: str) -> tuple[str, str, str]:
    """What stands before the document, the document, and what stands after it.

    Raises:
        ValueError: the instruction has none of the builder's wordings for `kind`.
    """
    from longlora_plugin.longqa.wordings import FRAMES

    # Where one wording begins like another or with the document itself, the longest one counts.
    for frame in sorted(FRAMES[kind], key=lambda each: -each.index("{document}")):
        before, _, rest = frame.partition("{document}")
        between = rest.partition("{question}")[0]
        end = instruction.rfind(between)
        if instruction.startswith(before) and end >= len(before):
            return before, instruction[len(before) : end], instruction[end:]
    raise ValueError(f"no wording for a {kind}: {instruction[:60]!r}")


def read_rows(path: Path) -> list[Row]:
    """The rows of a file that `longlora longqa build` wrote without a model."""
    from longlora_plugin.longqa.journal import Journal, row_name

    units = Journal(path).steps["unit"].values()
    facts = {pair["row"]: (pair["task"], unit) for unit in units for pair in unit["pairs"]}
    rows = []
    for line in path.read_bytes().splitlines():
        content, name = json.loads(line), row_name(line)
        task, unit = facts[name]
        before, document, after = split_instruction(content["instruction"], unit["kind"])
        rows.append(Row(name, task, unit["name"], document, (before, after), content["output"]))
    return rows


def sample(rows: Sequence[Row], per_task: int) -> list[Row]:
    """`per_task` rows of every task, evenly spaced through the file; all where there are fewer."""
    by_task: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_task[row.task].append(row)
    return [
        group[len(group) * place // wanted]
        for _, group in sorted(by_task.items())
        for wanted in [min(per_task, len(group))]
        for place in range(wanted)
    ]


def other_document(row: Row, rows: Sequence[Row]) -> str:
    """The document nearest in length from another book that does not hold the answer.

    Raises:
        ValueError: there is none.
    """
    found = {each.document for each in rows if each.book != row.book}
    usable = [text for text in sorted(found) if row.answer not in text]
    if not usable:
        raise ValueError(f"no other book without {row.answer!r}; give rows of at least two books")
    return min(usable, key=lambda text: abs(len(text) - len(row.document)))


def distractors(row: Row, rows: Sequence[Row], count: int = DISTRACTORS) -> list[str]:
    """`count` wrong answers of the right form; the same ones for every model.

    Raises:
        ValueError: the book does not have so many.
    """
    draw = random.Random(row.name)
    if row.task in LETTERS:
        letters = row.answer.split(", ")
        wrong: set[str] = set()
        while len(wrong) < count:
            wrong.add(", ".join(draw.sample(letters, len(letters))))
            wrong.discard(row.answer)
        return draw.sample(sorted(wrong), count)
    form = NAMES if row.task in NAMES else tuple({each.task for each in rows} - {*NAMES, *LETTERS})
    found = {(each.task, each.answer) for each in rows if each.book == row.book}
    found = {(task, text) for task, text in found if task in form}
    if row.task not in NAMES:
        found.update((row.task, text) for text in _sentences(row.document))
    # First what the same task could ask of the same document: the hardest to tell from the right
    # answer. The rest only as far as that is too little.
    ranks: dict[str, tuple[bool, bool, str]] = {}
    for task, text in sorted(found, reverse=True):
        if not is_exact(text, row.answer):
            rank = (text not in row.document, task != row.task, text)
            ranks[text] = min(ranks.get(text, rank), rank)
    pool = sorted(ranks, key=lambda text: ranks[text])
    pool = pool[: max(count, sum(not any(rank[:2]) for rank in ranks.values()))]
    if len(pool) < count:
        raise ValueError(f"{row.book} has only {len(pool)} wrong answers for {row.task}")
    return draw.sample(pool, count)


def _sentences(document: str) -> list[str]:
    """The sentences that the builder could have asked for."""
    from longlora_plugin.longqa.sections import Window
    from longlora_plugin.longqa.tasks import Material

    window = Window(0, (document,), document, 0)
    return sorted(text for text, _ in Material(window).all)


# ---- tokens ---------------------------------------------------------------------------------


def alpaca_tokens(tokenizer: Any, context: int) -> Callable[[str, str], tuple[Ids, Ids]]:
    """Function (instruction, output) → ids of prompt and of answer, as Axolotl trains on them.

    The token that ends an answer is not among them.
    """
    from axolotl.prompt_tokenizers import IGNORE_INDEX, AlpacaPromptTokenizingStrategy
    from axolotl.prompters import AlpacaPrompter

    # Without truncation, so that a row that is too long is seen.
    strategy = AlpacaPromptTokenizingStrategy(AlpacaPrompter(None), tokenizer, False, 10**9)

    def tokens(instruction: str, output: str) -> tuple[Ids, Ids]:
        row = strategy.tokenize_prompt({"instruction": instruction, "output": output})
        if len(row["input_ids"]) > context:
            raise ValueError(
                f"a row has {len(row['input_ids'])} tokens, more than sequence_len: {context}; "
                f"build with --context {context}"
            )
        start = row["labels"].count(IGNORE_INDEX)
        prompt, answer = row["input_ids"][:start], row["input_ids"][start:]
        return prompt, answer[:-1] if answer[-1] == tokenizer.eos_token_id else answer

    return tokens


def make_questions(
    rows: Sequence[Row], pool: Sequence[Row], tokenizer: Any, context: int
) -> list[Question]:
    """Questions for `rows`; wrong answers and other documents come from `pool`."""
    tokens = alpaca_tokens(tokenizer, context)
    questions = []
    for row in rows:
        asked, other = row.instruction(row.document), row.instruction(other_document(row, pool))
        prompt, right = tokens(asked, row.answer)
        wrong = [tokens("", text)[1] for text in distractors(row, pool)]
        questions.append(Question(row, prompt, tokens(other, row.answer)[0], [right, *wrong]))
    return questions

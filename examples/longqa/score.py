"""Score one model on held-out LongQA rows:

    python examples/longqa/score.py RECIPE ROWS.jsonl OUT.json --model base
    python examples/longqa/score.py RECIPE ROWS.jsonl OUT.json --model seed-1=outputs/longqa/seed-1

A model is `base`, or NAME=FOLDER with an adapter or a merged model in it. Full attention, greedy
decoding with a KV cache. Prompt and answer are tokenized by Axolotl's own code for `type: alpaca`,
so they are what the recipe trains on. Of every question:

- `exact`: the decoded answer is the right one, white space, case and outer punctuation aside;
  `begins`: it begins with the right one. A model that was never trained to stop goes on, so this is
  the fair one for it.
- `nll`: negative log-likelihood of the right answer, in nats, over its `answer_tokens` tokens. The
  token that ends an answer is left out: predicting it is form, not content.
- `nll_other`: the same with the document replaced by a piece of another book. What a model gains
  here, it gains without reading; only a gain of `nll` beyond it comes from the document.
- `first`: the right answer has a higher likelihood a token than each of DISTRACTORS others: other
  sentences of this document, other names asked for in this book, other orders of the letters.
  Guessing is right in 1 of DISTRACTORS + 1 cases.

Shapes: B questions a batch, C candidates (the right answer first).
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHARES, NATS = ("exact", "begins", "first"), ("nll", "nll_other")
DISTRACTORS = 3
BATCH = 8
EXTRA_TOKENS = 4
"""Tokens decoded beyond the right answer's, to see whether it ends there."""

Ids = list[int]
LETTERS = ("order_of_events",)
NAMES = ("who_said", "fill_name")


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
    """The rows of a file that `axolotl longlora longqa build` wrote without a model."""
    from longlora_plugin.longqa.journal import Journal, row_name

    units = Journal(path).units.values()
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
    from longlora_plugin.longqa.sections import Section, Window
    from longlora_plugin.longqa.tasks import Material

    window = Window(0, (Section(None, document),), document, 0)
    return sorted(text for text, _ in Material(window, "plain", "book").all)


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


# ---- scores ---------------------------------------------------------------------------------


def log_likelihoods(
    model: Any, tokenizer: Any, prompts: Sequence[Ids], answers: Sequence[list[Ids]]
) -> list[list[float]]:
    """Log-likelihood in nats of each prompt's candidate answers, [B][C]."""
    from longlora_plugin.evaluation.passkey import Trial, candidate_likelihoods

    trials = [
        Trial(prompt, "", candidates, 0.0)
        for prompt, candidates in zip(prompts, answers, strict=True)
    ]
    found: list[list[float]] = candidate_likelihoods(model, tokenizer, trials).tolist()
    return found


def can_become(said: str, answer: str) -> bool:
    """Whether an answer that so far reads `said` can still turn out to begin with the right one."""
    # The last token may be a part of a character.
    said, answer = normalise(said.rstrip("\N{REPLACEMENT CHARACTER}")), normalise(answer)
    return answer.startswith(said) or said.startswith(answer)


def decode_greedily(
    model: Any, tokenizer: Any, prompts: Sequence[Ids], answers: Sequence[str], new_tokens: int
) -> list[str]:
    """What the model says to each prompt, in at most `new_tokens` tokens.

    An answer is followed only as far as it can still become the right one.
    """
    import torch
    from transformers import StoppingCriteria, StoppingCriteriaList

    batch = tokenizer.pad({"input_ids": list(prompts)}, padding_side="left", return_tensors="pt")
    start = batch["input_ids"].shape[1]

    def texts(ids: Any) -> list[str]:
        found: list[str] = tokenizer.batch_decode(ids[:, start:], skip_special_tokens=True)
        return found

    class Lost(StoppingCriteria):
        def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
            pairs = zip(texts(input_ids), answers, strict=True)
            return torch.tensor([not can_become(said, answer) for said, answer in pairs])

    with torch.inference_mode():
        produced = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=new_tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=tokenizer.pad_token_id,
            stopping_criteria=StoppingCriteriaList([Lost()]),
        )
    return texts(produced)


def score(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Question],
    *,
    batch_size: int = BATCH,
    notify: Callable[[int], None] = lambda done: None,
) -> list[dict[str, Any]]:
    """One result for each question, in their order; the keys are those of the module docstring."""
    results: list[dict[str, Any]] = [{} for _ in questions]
    # Prompts of one length together: padding costs as much as text.
    order = sorted(range(len(questions)), key=lambda place: len(questions[place].prompt))
    for first in range(0, len(order), batch_size):
        places = order[first : first + batch_size]
        batch = [questions[place] for place in places]
        prompts, answers = [each.prompt for each in batch], [each.answers for each in batch]
        right = log_likelihoods(model, tokenizer, prompts, answers)
        other = log_likelihoods(
            model, tokenizer, [each.prompt_other for each in batch], [each[:1] for each in answers]
        )
        longest = max(len(each[0]) for each in answers)
        wanted = [each.row.answer for each in batch]
        said = decode_greedily(model, tokenizer, prompts, wanted, longest + EXTRA_TOKENS)
        for place, question, with_it, without, text in zip(
            places, batch, right, other, said, strict=True
        ):
            results[place] = result_of(question, with_it, without[0], text)
        notify(len(batch))
    return results


def result_of(
    question: Question, likelihoods: Sequence[float], other: float, said: str
) -> dict[str, Any]:
    """The result of one question.

    Args:
        likelihoods: log-likelihood of each of `question.answers`.
        other: log-likelihood of the right one after the other document.
        said: what was decoded, up to where it went wrong.
    """
    row = question.row
    a_token = [total / len(ids) for total, ids in zip(likelihoods, question.answers, strict=True)]
    return {
        "row": row.name,
        "task": row.task,
        "book": row.book,
        "prompt_tokens": len(question.prompt),
        "answer_tokens": len(question.answers[0]),
        "answer": row.answer,
        "said": said,
        "exact": is_exact(said, row.answer),
        "begins": begins_with(said, row.answer),
        "nll": -likelihoods[0],
        "nll_other": -other,
        "first": all(a_token[0] > wrong for wrong in a_token[1:]),
    }


def by_task(results: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Of each task: shares of `exact`, `begins` and `first`; nats a token of `nll`, `nll_other`.

    The last entry, `all`, is the mean over the tasks, each counting the same.
    """
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for result in results:
        groups[result["task"]].append(result)
    table: dict[str, dict[str, float]] = {}
    for task, group in sorted(groups.items()):
        tokens = sum(each["answer_tokens"] for each in group)
        table[task] = {
            **{
                key: sum(r[key] for r in group) / len(group) for key in ("exact", "begins", "first")
            },
            **{key: sum(r[key] for r in group) / tokens for key in NATS},
        }
        table[task]["questions"] = len(group)
    every = list(table.values())
    table["all"] = {key: sum(each[key] for each in every) / len(every) for key in every[0]}
    table["all"]["questions"] = len(results)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("recipe", type=Path, help="names the base model and sequence_len")
    parser.add_argument("rows", type=Path, help="what `longqa build` wrote")
    parser.add_argument("out", type=Path, help="results, JSON")
    parser.add_argument("--model", default="base", help="base, or NAME=FOLDER")
    parser.add_argument("--per-task", type=int, default=50, help="questions of each task")
    args = parser.parse_args()

    from rich.progress import Progress

    from longlora_plugin.evaluation.models import load_tokenizer, model_sources
    from longlora_plugin.run.recipe import read_recipe

    recipe = read_recipe(args.recipe)
    tokenizer = load_tokenizer(recipe)
    pool = read_rows(args.rows)
    rows = sample(pool, args.per_task)
    questions = make_questions(rows, pool, tokenizer, recipe.sequence_len)
    (source,) = model_sources(recipe, [args.model])
    model = source.load("cpu", "float32")
    with Progress() as progress:
        bar = progress.add_task(source.label, total=len(questions))
        results = score(
            model, tokenizer, questions, notify=lambda done: progress.advance(bar, done)
        )
    content = {"model": source.label, "by_task": by_task(results), "results": results}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    partial = args.out.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(args.out)


if __name__ == "__main__":
    main()

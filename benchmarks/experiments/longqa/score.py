"""Score one model on held-out LongQA rows:

    python -m benchmarks.experiments.longqa.score RECIPE ROWS.jsonl OUT.json --model base
    python -m benchmarks.experiments.longqa.score RECIPE ROWS.jsonl OUT.json --model NAME=FOLDER

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
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.experiments.longqa.likelihood import log_likelihoods
from benchmarks.experiments.longqa.questions import (
    Ids,
    Question,
    begins_with,
    is_exact,
    make_questions,
    normalise,
    read_rows,
    sample,
)

SHARES, NATS = ("exact", "begins", "first"), ("nll", "nll_other")
BATCH = 8
EXTRA_TOKENS = 4
"""Tokens decoded beyond the right answer's, to see whether it ends there."""


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

    from longlora_plugin.evaluation.models import model_sources
    from longlora_plugin.run.recipe import read_recipe

    recipe = read_recipe(args.recipe)
    (source,) = model_sources(recipe, [args.model])
    loaded = source.load("cpu", "float32")
    model, tokenizer = loaded.model, loaded.tokenizer
    pool = read_rows(args.rows)
    rows = sample(pool, args.per_task)
    questions = make_questions(rows, pool, tokenizer, recipe.sequence_len)
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

"""How LongQA's answers are scored, with models whose answers are known by hand."""

from __future__ import annotations

import json
import math
import random
import re
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from longqa_material import PEOPLE, PLACES, story
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks.experiments.longqa import documents, questions, score
from longlora_plugin.cli import longlora
from longlora_plugin.longqa.wordings import FRAMES, phrase

for package in ("sentencex", "datasketch"):
    pytest.importorskip(package)

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "examples" / "quickstart" / "model"
CONTEXT = 1024
NEW_NAMES = "Ada Bela Cora Dina Edda Fina Gisa Hedda Ithaca Jever Kiel Lund Metz Naxos"
RENAMED = dict(zip(PEOPLE + PLACES, NEW_NAMES.split(), strict=True))


def book(number: int) -> str:
    """A made-up book; the names of the second are none of the first's."""
    text = story(number)
    return re.sub(r"\w+", lambda m: RENAMED.get(m[0], m[0]), text) if number == 2 else text


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL, local_files_only=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Rows that the real command builds from two books."""
    folder = tmp_path_factory.mktemp("longqa")
    books = folder / "books.jsonl"
    texts = [{"title": f"Book, the {n}.", "text": book(n)} for n in (1, 2)]
    books.write_text("".join(json.dumps(text) + "\n" for text in texts))
    written = documents.write_books(books, folder / "books")
    assert [path.name for path in written] == ["book-the-1.txt", "book-the-2.txt"]
    out = folder / "rows.jsonl"
    arguments = [
        folder / "books",
        out,
        "--tokenizer",
        MODEL,
        "--context",
        CONTEXT,
        "--kind",
        "book",
    ]
    result = CliRunner().invoke(longlora, ["longqa", "build", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture(scope="module")
def rows(data):
    return questions.read_rows(data)


def bigram_model(tokenizer, chances: dict[int, dict[int, float]]) -> LlamaForCausalLM:
    """A Llama whose layers add nothing and whose head holds log P(next | current).

    The probability that a row of `chances` leaves is spread over all tokens; a row that is not
    there is spread evenly.
    """
    size = len(tokenizer)
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=size,
        intermediate_size=1,
        num_hidden_layers=1,
        num_attention_heads=1,
        head_dim=2,
        tie_word_embeddings=False,
        max_position_embeddings=2048,
        rms_norm_eps=1e-12,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config).eval()
    probability = torch.full((size, size), 1 / size)
    for current, row in chances.items():
        probability[current] = (1 - sum(row.values())) / (size - len(row))
        for following, chance in row.items():
            probability[current, following] = chance
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        # The norm makes a one-hot vector √size long.
        model.lm_head.weight.copy_(probability.log().T / math.sqrt(size))
    return model


def question(task: str, prompt: list[int], answers: list[list[int]], text: str, book: str = "b"):
    row = questions.Row(f"{task} {text}", task, book, "", ("", ""), text)
    return questions.Question(row, prompt, prompt[::-1], answers)


# ---- answers as text ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "answer", "exact", "begins"),
    [
        ("Peter", "Peter", True, True),
        (" “PETER.” ", "Peter", True, True),
        ("Hark ye:\nThe queen", "Hark ye: The  queen", True, True),
        ("Peter, and he said", "Peter", False, True),
        ("Peterborough", "Peter", False, False),
        ("Simon Peter", "Peter", False, False),
        ("A, B, D, C", "A, B, C, D", False, False),
        ("", "Peter", False, False),
    ],
)
def test_an_answer_is_exact_but_for_case_spaces_and_outer_marks(said, answer, exact, begins):
    assert questions.is_exact(said, answer) is exact
    assert questions.begins_with(said, answer) is begins


@pytest.mark.parametrize(
    ("said", "answer", "possible"),
    [
        ("", "Peter", True),
        ("“Pe", "Peter", True),
        ("Hark ye:", "Hark ye: the queen", True),
        ("Peter, and", "Peter", True),
        ("Caf\N{REPLACEMENT CHARACTER}", "Café", True),
        ("Pa", "Peter", False),
    ],
)
def test_an_answer_is_given_up_only_where_it_can_no_longer_become_the_right_one(
    said, answer, possible
):
    assert score.can_become(said, answer) is possible


# ---- rows -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FRAMES)
def test_an_instruction_is_split_where_its_wording_put_the_document(kind):
    document = "One line.\n\nAnother one: that was it.\n\n---\nThe end"
    seen = set()
    for seed in range(40):
        whole = phrase(kind, document, "Who says these words?", random.Random(seed))
        before, found, after = questions.split_instruction(whole, kind)
        assert found == document
        assert before + found + after == whole
        assert after.endswith("Who says these words?")
        seen.add((before, after))
    assert len(seen) == len(FRAMES[kind])


def test_an_instruction_in_no_known_wording_is_refused():
    with pytest.raises(ValueError, match="no wording for a book"):
        questions.split_instruction("Who says these words?", "book")


def test_rows_come_back_with_task_book_and_document(data, rows):
    written = [json.loads(line) for line in data.read_text().splitlines()]
    assert len(rows) == len(written) > 20
    for row, content in zip(rows, written, strict=True):
        assert row.instruction(row.document) == content["instruction"]
        number = int(row.book.removeprefix("book-the-").removesuffix(".txt"))
        assert all(part in book(number) for part in row.document.split("\n\n"))
        assert row.answer == content["output"]
    assert len({row.task for row in rows}) >= 5


def test_a_sample_is_spread_evenly_over_the_rows_of_each_task():
    rows = [questions.Row(str(n), "ab"[n % 2], "", "", ("", ""), "") for n in range(21)]
    assert [row.name for row in questions.sample(rows, 3)] == ["0", "6", "14", "1", "7", "13"]
    assert len(questions.sample(rows, 100)) == 21


def test_the_other_document_is_of_another_book_near_in_length_and_without_the_answer():
    def row(book, document, answer="Ann"):
        return questions.Row("", "fill_name", book, document, ("", ""), answer)

    asked = row("one", "x" * 50)
    pool = [
        asked,
        row("one", "y" * 50),
        row("two", "Ann " + "z" * 46),
        row("two", "z" * 30),
        row("two", "z" * 80),
    ]
    assert questions.other_document(asked, pool) == "z" * 30
    with pytest.raises(ValueError, match="two books"):
        questions.other_document(asked, pool[:3])


def test_wrong_answers_are_wrong_of_the_right_form_and_always_the_same(rows):
    for row in rows:
        found = questions.distractors(row, rows)
        assert found == questions.distractors(row, rows)
        assert len({*map(questions.normalise, found), questions.normalise(row.answer)}) == 4
        if row.task in questions.LETTERS:
            assert all(sorted(text) == sorted(row.answer) for text in found)
        elif row.task in questions.NAMES:
            assert all(len(text.split()) <= 3 for text in found)
        else:
            # There are enough in the document, so none is from elsewhere.
            assert all(text in row.document and len(text.split()) > 3 for text in found)


# ---- tokens ---------------------------------------------------------------------------------


def test_tokens_are_those_that_axolotl_trains_on(tokenizer, data, rows):
    from axolotl.utils.data.wrappers import get_dataset_wrapper
    from axolotl.utils.dict import DictDefault
    from datasets import Dataset

    written = Dataset.from_list([json.loads(line) for line in data.read_text().splitlines()[:5]])
    cfg = DictDefault(sequence_len=CONTEXT, train_on_inputs=False, dataset_num_proc=1)
    wrapped, _ = get_dataset_wrapper(
        DictDefault(path=str(data), type="alpaca"), tokenizer, cfg, "alpaca", written
    )
    tokens = questions.alpaca_tokens(tokenizer, CONTEXT)
    for trained, row in zip(wrapped, rows, strict=False):
        prompt, answer = tokens(row.instruction(row.document), row.answer)
        assert trained["input_ids"] == [*prompt, *answer, tokenizer.eos_token_id]
        assert trained["labels"] == [-100] * len(prompt) + [*answer, tokenizer.eos_token_id]


def test_a_row_longer_than_the_context_is_refused(tokenizer):
    tokens = questions.alpaca_tokens(tokenizer, 100)
    with pytest.raises(ValueError, match=r"more than sequence_len: 100; build with --context 100"):
        tokens("word " * 100, "Peter")


def test_the_control_asks_the_same_about_the_other_document(tokenizer, rows):
    chosen = questions.sample(rows, 2)
    for row, made in zip(
        chosen, questions.make_questions(chosen, rows, tokenizer, CONTEXT), strict=True
    ):
        right, other = (tokenizer.decode(ids) for ids in (made.prompt, made.prompt_other))
        assert row.document in right
        assert row.document not in other
        assert questions.other_document(row, rows) in other
        for text in (right, other):
            assert row.frame[0] in text
            assert text.endswith(f"{row.frame[1]}\n\n### Response:\n")
        assert [tokenizer.decode(ids) for ids in made.answers] == [
            row.answer,
            *questions.distractors(row, rows),
        ]


# ---- scores ---------------------------------------------------------------------------------


def test_scores_of_a_model_with_known_probabilities_are_those_worked_out_by_hand(tokenizer):
    p, a, b, c, d, e = 400, 401, 402, 404, 405, 411
    end = tokenizer.eos_token_id
    model = bigram_model(
        tokenizer,
        {
            # After the prompt's last token p: a, then b, then the end.
            p: {a: 0.5, c: 0.3, e: 0.1},
            a: {b: 0.25, end: 0.2},
            b: {end: 0.9},
            # After another prompt's last token d: c, whose right answer would be e.
            d: {c: 0.6, e: 0.2},
            c: {end: 0.5},
        },
    )
    text = {name: tokenizer.decode(ids) for name, ids in {"ab": [a, b], "e": [e]}.items()}
    questions = [
        question("one", [1, 50, p], [[a, b], [c], [e]], text["ab"]),
        question("two", [1, 60, 61, 62, d], [[e], [c], [a]], text["e"]),
    ]
    for batch_size in (1, 2):
        first, second = score.score(model, tokenizer, questions, batch_size=batch_size)
        assert first["nll"] == pytest.approx(-math.log(0.5 * 0.25), abs=1e-3)
        # The control's prompt ends with token 1, which the table leaves even.
        assert first["nll_other"] == pytest.approx(math.log(2048) - math.log(0.25), abs=1e-3)
        assert (first["said"], first["exact"], first["begins"]) == (text["ab"], True, True)
        # √(0.5 · 0.25) = 0.354 a token against 0.3 and 0.1.
        assert (first["answer_tokens"], first["first"]) == (2, True)
        assert second["nll"] == pytest.approx(-math.log(0.2), abs=1e-3)
        assert (second["exact"], second["begins"], second["first"]) == (False, False, False)
        assert (second["answer_tokens"], second["prompt_tokens"]) == (1, 5)


def test_a_models_answers_do_not_depend_on_the_batch(tokenizer, rows):
    model = AutoModelForCausalLM.from_pretrained(MODEL, local_files_only=True).eval()
    chosen = questions.sample(rows, 1)
    asked = questions.make_questions(chosen, rows, tokenizer, CONTEXT)
    together = score.score(model, tokenizer, asked, batch_size=len(asked))
    alone = score.score(model, tokenizer, asked, batch_size=1)
    assert [each["row"] for each in together] == [row.name for row in chosen]
    for one, other in zip(together, alone, strict=True):
        assert one["nll"] == pytest.approx(other["nll"], rel=1e-4)
        assert one["nll_other"] == pytest.approx(other["nll_other"], rel=1e-4)
        shorter = min(len(one["said"]), len(other["said"]))
        assert one["said"][:shorter] == other["said"][:shorter]
        assert (one["exact"], one["first"]) == (other["exact"], other["first"])


def test_tasks_are_averaged_by_question_and_by_token_and_count_the_same_in_all():
    def result(task, exact, nll, tokens):
        return {
            **{"task": task, "exact": exact, "begins": True, "first": not exact},
            **{"nll": nll, "nll_other": 2 * nll, "answer_tokens": tokens},
        }

    found = score.by_task(
        [result("b", True, 3.0, 1), result("a", True, 6.0, 4), result("a", False, 4.0, 1)]
    )
    assert list(found) == ["a", "b", "all"]
    assert found["a"] == {
        **{"exact": 0.5, "begins": 1.0, "first": 0.5, "nll": 2.0, "nll_other": 4.0},
        "questions": 2,
    }
    assert found["b"]["nll"] == 3.0
    assert found["all"]["nll"] == 2.5
    assert found["all"]["exact"] == 0.75
    assert found["all"]["questions"] == 3

"""Tasks made from the text: right answers, one place each, the same for the same seed."""

from __future__ import annotations

import random
import re

import pytest
from longqa_material import PEOPLE, PLACES, story

from longlora_plugin.longqa import tasks
from longlora_plugin.longqa.sections import Window
from longlora_plugin.longqa.tasks import GAP, TASKS, Material, make_pairs

pytest.importorskip("sentencex")

SEEDS = range(25)


def window(*sections: str) -> Window:
    return Window(0, sections, "\n\n".join(sections), 0)


def material(*sections: str) -> Material:
    return Material(window(*sections))


@pytest.fixture(scope="module")
def book() -> Material:
    return material(*re.split(r"\n\n(?=CHAPTER)", story(5)))


def quoted(question: str) -> str:
    return re.search("“(.*)”", question, re.DOTALL).group(1)


@pytest.mark.parametrize("task", TASKS)
def test_the_same_seed_gives_the_same_pair_and_another_seed_another(book, task):
    first = [TASKS[task](book, random.Random(seed)) for seed in SEEDS]
    assert first == [TASKS[task](book, random.Random(seed)) for seed in SEEDS]
    assert len(set(first)) > 5


@pytest.mark.parametrize("task", TASKS)
def test_evidence_stands_in_the_text_word_for_word(book, task):
    for seed in SEEDS:
        pair = TASKS[task](book, random.Random(seed))
        assert pair.task == task
        assert pair.evidence
        assert all(quote in book.window.text for quote in pair.evidence)


def test_who_said_answers_with_the_one_who_said_it(book):
    for seed in SEEDS:
        pair = tasks.who_said(book, random.Random(seed))
        words = re.search(r"We have \d+ reasons to keep the \w+", pair.question).group(0)
        assert f"“{words},” said {pair.answer}." in book.window.text


@pytest.mark.parametrize(
    ("text", "who"),
    [
        ("“I never saw the boat at all,” said Mr. Hale quietly.", "Mr. Hale"),
        ('"I never saw the boat at all!" Anna Hale cried, and left.', "Anna Hale"),
        ("Then Hale replied, “I never saw the boat at all.”", "Hale"),
        ("And Moses said unto Pharaoh, Let all of them go out of here.", "Moses"),
        ("ANNA.\nI never saw the boat at all, sir.\n\nANNA.\nNor will I see it today.", "ANNA"),
    ],
)
def test_who_said_knows_these_ways_to_quote(text, who):
    assert tasks.who_said(material(text), random.Random(0)).answer == who


@pytest.mark.parametrize(
    "text",
    [
        "“I never saw the boat at all,” said he, and left the room.",
        "“I never saw the boat at all,” said Ann. “I never saw the boat at all,” said Bob.",
        "NOTE: this warning stands in a report and nobody says it.",
    ],
)
def test_who_said_is_none_without_one_certain_speaker(text):
    assert tasks.who_said(material(text), random.Random(0)) is None


def test_what_follows_answers_with_the_next_sentence(book):
    for seed in SEEDS:
        pair = tasks.what_follows(book, random.Random(seed))
        first, after = pair.evidence
        assert pair.answer == after
        assert first in pair.question
        between = book.window.text.split(first, 1)[1].split(after, 1)[0]
        assert between.strip() == ""


def test_a_sentence_that_stands_twice_is_never_asked_about():
    twice = "The bell of Pellmar rang three times."
    text = story(7).replace("\n\nCHAPTER 2", f" {twice}\n\nCHAPTER 2")
    repeating = material(*re.split(r"\n\n(?=CHAPTER)", f"{text} {twice}"))
    for seed in SEEDS:
        for pair in make_pairs(repeating, 12, random.Random(seed)):
            assert twice not in (pair.answer, *pair.evidence)
            assert twice not in pair.question


def test_fill_name_leaves_out_the_name_that_is_the_answer(book):
    for seed in SEEDS:
        pair = tasks.fill_name(book, random.Random(seed))
        assert pair.answer in {*PEOPLE, *PLACES}
        gapped = re.search(r"“(.*)”", pair.question, re.DOTALL).group(1)
        assert GAP in gapped
        assert pair.answer not in gapped
        assert gapped.replace(GAP, pair.answer) == pair.evidence[0]


def test_find_needle_asks_for_the_only_sentence_with_that_word(book):
    for seed in SEEDS:
        pair = tasks.find_needle(book, random.Random(seed))
        word = quoted(pair.question)
        assert len(re.findall(rf"\b{word}\b", book.window.text, re.IGNORECASE)) == 1
        assert word in pair.answer


def test_order_of_events_answers_with_the_order_in_the_text(book):
    for seed in SEEDS:
        pair = tasks.order_of_events(book, random.Random(seed))
        listed = dict(re.findall(r"\((\w)\) (.*)", pair.question))
        places = [book.window.text.index(listed[letter]) for letter in pair.answer.split(", ")]
        assert places == sorted(places)
        assert len(places) == len(listed) >= 3
        assert list(listed) != pair.answer.split(", ")


def test_multi_hop_joins_two_sections_by_the_name_left_out(book):
    sections = book.window.sections
    for seed in SEEDS:
        pair = tasks.multi_hop(book, random.Random(seed))
        clue, answer = pair.evidence
        gapped, opening = re.findall(r"“(.*?)(?: …)?”(?= |,)", pair.question, re.DOTALL)[-2:]
        if GAP not in gapped:  # a clue that itself quotes speech
            gapped = re.search(r"“(.*)” (?:Work|Then)", pair.question, re.DOTALL).group(1)
        name = next(n for n in (*PEOPLE, *PLACES) if gapped.replace(GAP, n) == clue)
        assert name not in gapped
        home = [n for n, text in enumerate(sections) if clue in text]
        away = [n for n, text in enumerate(sections) if answer in text]
        assert home != away
        after = sections[away[0]][sections[away[0]].index(opening) :]
        first = re.search(rf"\b{name}\b", after).start()
        start = after.index(answer)
        assert start <= first < start + len(answer)


@pytest.mark.parametrize("task", TASKS)
def test_a_text_that_cannot_carry_a_task_gives_none(task):
    assert TASKS[task](material("Too short."), random.Random(0)) is None


def test_make_pairs_takes_turns_and_repeats_nothing(book):
    pairs = make_pairs(book, 12, random.Random(0))
    assert [pair.task for pair in pairs[:6]] == list(TASKS)
    assert len({(pair.task, pair.answer, pair.evidence) for pair in pairs}) == 12


def test_make_pairs_fills_up_with_other_tasks_where_one_does_not_apply():
    plain = material(story(6).replace("said", "says of"))
    report = material(re.sub(r"“[^”]*” said \w+\.", "", story(6)))
    assert len(make_pairs(plain, 8, random.Random(0))) == 8
    pairs = make_pairs(report, 8, random.Random(0))
    assert len(pairs) == 8
    assert "who_said" not in {pair.task for pair in pairs}


def test_make_pairs_ends_where_a_text_gives_no_more():
    assert len(make_pairs(material("Anna lives in the old town hall."), 50, random.Random(0))) < 10


def test_answers_are_spread_over_the_window(book):
    places = [
        book.window.text.index(pair.evidence[0]) / len(book.window.text)
        for seed in range(60)
        if (pair := tasks.find_needle(book, random.Random(seed)))
    ]
    thirds = [sum(lo <= place < lo + 1 / 3 for place in places) for lo in (0, 1 / 3, 2 / 3)]
    assert min(thirds) >= 8

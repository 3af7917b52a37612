"""Documents are cut by whole sections, never inside a sentence."""

from __future__ import annotations

import pytest
from longqa_material import story

from longlora_plugin.longqa.documents import Document
from longlora_plugin.longqa.scripts import sentences
from longlora_plugin.longqa.sections import split_sections, windows

pytest.importorskip("sentencex")


def words(texts):
    """A stand-in for a tokenizer: one token a word, one a line break."""
    return [len(text.split()) + text.count("\n") for text in texts]


def document(text: str, style: str = "plain") -> Document:
    return Document("a", text, style, "book")


def flat(text: str) -> str:
    return " ".join(text.split())


def test_a_document_that_fits_is_one_window_with_all_its_text():
    text = story(1)
    cut, left_out = windows(document(text), 10_000, words)
    assert len(cut) == 1
    assert left_out == 0
    assert cut[0].text == text
    assert cut[0].tokens == words([text])[0]


@pytest.mark.parametrize("budget", [40, 90, 250, 600])
def test_windows_fit_hold_all_text_once_and_start_and_end_with_a_sentence(budget):
    text = story(2)
    cut, left_out = windows(document(text), budget, words)
    assert left_out == 0
    assert all(0 < window.tokens <= budget for window in cut)
    assert [window.tokens for window in cut] == words([window.text for window in cut])
    assert flat(" ".join(window.text for window in cut)) == flat(text)
    whole = {flat(sentence) for sentence in sentences(text)}
    for window in cut:
        found = [flat(sentence) for sentence in sentences(window.text)]
        assert {found[0], found[-1]} <= whole


def test_sections_that_fit_are_never_divided():
    sections = set(split_sections(document(story(3))))
    budget = max(words(list(sections))) + 5
    cut, _ = windows(document(story(3)), budget, words)
    assert len(cut) > 1
    assert {section for window in cut for section in window.sections} == sections


def test_neighbouring_sections_share_a_window_where_they_fit():
    sections = split_sections(document(story(3)))
    budget = sum(words(sections[:2])) + 10
    cut, _ = windows(document(story(3)), budget, words)
    assert list(cut[0].sections) == sections[:2]
    assert ["CHAPTER 1" in sections[0], sections[1][:9]] == [True, "CHAPTER 2"]


def test_a_sentence_longer_than_the_window_is_left_out_and_counted():
    long = "Endless " * 60 + "it was."
    text = f"Short one here. {long} Another short one."
    cut, left_out = windows(document(text), 20, words)
    assert left_out == 1
    assert [window.text for window in cut] == ["Short one here. Another short one."]


def test_plain_headings_are_found_but_not_a_speaker_in_a_play():
    text = "ACT I\n\nSCENE I. A street.\n\nIAGO.\nI hate the Moor.\n\n" + "He said much. " * 20
    text += "\n\nSCENE II. A house.\n\n" + "They said little. " * 20
    first, second = split_sections(document(text))
    assert first.startswith("ACT I\n\nSCENE I. A street.\n\nIAGO.")
    assert second.startswith("SCENE II. A house.")


def test_tokens_that_do_not_add_up_still_fit():
    def costly(texts):
        # Every join costs five tokens that the parts do not show.
        return [len(text.split()) + 5 * text.count("\n\n") for text in texts]

    cut, _ = windows(document(story(4)), 80, costly)
    assert all(costly([window.text])[0] <= 80 for window in cut)
    assert flat(" ".join(window.text for window in cut)) == flat(story(4))


def test_abbreviations_do_not_end_a_sentence():
    text = "Mr. Smith met Dr. Cole at 5 p.m. near the mill. They talked."
    assert sentences(text) == [text[:-13], "They talked."]

"""Evidence must stand in the document; near-duplicates are found."""

from __future__ import annotations

import pytest

from longlora_plugin.longqa.quality import NearDuplicates, has_evidence

pytest.importorskip("datasketch")
pytest.importorskip("rapidfuzz")

TEXT = "The ferry left at dawn.\nNobody at the quay had seen the mate; the tide was out."


@pytest.mark.parametrize(
    ("quotes", "edits", "stands"),
    [
        (["The ferry left at dawn."], 0, True),
        (["left at dawn. Nobody  at the quay"], 0, True),
        (["The ferry left at dusk."], 0, False),
        (["The ferry left at dusk."], 3, True),
        (["The ferry left at dusk."], 2, False),
        (["The ferry left at dawn.", "the tide was in."], 0, False),
        (["Nobody at the quay had seen teh mate"], 2, True),
        (["The ferry sank at noon."], 3, False),
        ([], 5, False),
        (["dawn"], 0, False),
        ([TEXT + " And more than the whole document holds."], 3, False),
    ],
)
def test_evidence_stands_verbatim_or_within_the_edits(quotes, edits, stands):
    assert has_evidence(quotes, TEXT, edits) is stands


def test_near_duplicates_are_found_and_different_texts_kept():
    seen = NearDuplicates(0.8)
    first = "Who mended the lantern of Ostervik? Miriam mended it in the year 1204."
    assert seen.repeats("one", first) is None
    near = "Who mended the lantern of Ostervik?  miriam mended it in the year 1204!"
    assert seen.repeats("two", near) == "one"
    other = "Who painted the bridge of Halmouth? Nobody knows who painted it."
    assert seen.repeats("three", other) is None


def test_similarity_decides_and_above_one_switches_off():
    a, b = "The gauge was read at nine and at ten.", "The gauge was read at nine and at noon."
    strict, loose, off = NearDuplicates(0.95), NearDuplicates(0.5), NearDuplicates(1.5)
    for seen in (strict, loose, off):
        assert seen.repeats("a", a) is None
    assert strict.repeats("b", b) is None
    assert loose.repeats("b", b) == "a"
    assert off.repeats("again", a) is None


def test_a_sampled_comparison_finds_another_edition_of_a_long_text():
    from longqa_material import story

    seen = NearDuplicates(0.8, sample=8)
    assert seen.repeats("first", story(1, chapters=12)) is None
    edition = story(1, chapters=12).replace("old ", "aged ", 3)
    assert seen.repeats("second", edition) == "first"
    assert seen.repeats("other", story(2, chapters=12)) is None

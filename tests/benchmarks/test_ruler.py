"""The models of `make ruler` score what they see."""

from benchmarks.ruler.__main__ import REACHES, known_models


def test_a_model_made_by_hand_finds_what_it_sees():
    rows = known_models(3, (512,))
    assert {row["model"] for row in rows} == set(REACHES)
    scores = {(row["model"], row["task"], row["length"]): row["score"] for row in rows}
    for (model, task, length), score in scores.items():
        reach = REACHES[model]
        if reach is None or reach > length:
            assert score == 1.0, (model, task, length)
        assert score <= scores["sees everything", task, length]
    assert any(score < 1 for (model, _, _), score in scores.items() if REACHES[model] == 256)

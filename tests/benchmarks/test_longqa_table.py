"""The table of LongQA's scores before and after training, and what `make longqa` runs."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks.experiments.longqa import table

ROOT = Path(__file__).parents[2]


def measures(nll: float, other: float, exact: float = 0.0, questions: int = 5) -> dict:
    shares = {"exact": exact, "begins": exact, "first": exact}
    return {"all": {**shares, "nll": nll, "nll_other": other, "questions": questions}}


def test_the_table_has_the_mean_and_the_spread_of_the_seeds_and_what_the_document_is_worth():
    rows = table.compare(
        measures(5.0, 6.0), [measures(3.0, 5.0, 0.2), measures(4.0, 5.5, 0.5), measures(3.5, 5.0)]
    )
    assert rows["all"]["nll"] == {
        **{"before": 5.0, "mean": 3.5, "min": 3.0, "max": 4.0, "seeds": [3.0, 4.0, 3.5]}
    }
    assert rows["all"]["worth"]["before"] == 1.0
    assert rows["all"]["worth"]["seeds"] == [2.0, 1.5, 1.5]
    assert table.markdown(rows, ["nll", "exact"]) == (
        "| task | nats a token | exact match [%] |\n|---|---|---|\n"
        "| all | 5.00 → 3.50 (3.00 to 4.00) | 0 → 23 (0 to 50) |\n"
    )


def test_models_asked_different_questions_are_not_compared():
    with pytest.raises(ValueError, match="not the same questions"):
        table.compare(measures(5.0, 6.0), [measures(3.0, 5.0, questions=4)])


def result(row: str, worth: float, tokens: int = 1) -> dict:
    return {
        **{"row": row, "task": "a", "nll": 10.0, "nll_other": 10.0 + worth},
        "answer_tokens": tokens,
    }


def test_the_gain_of_worth_is_by_token_and_its_interval_holds_it():
    before = [result(str(n), 1.0, 2) for n in range(40)]
    # Two seeds: half of the questions gain 4 and 2 nats, half of them none.
    after = [[result(str(n), 1.0 + nats * (n % 2), 2) for n in range(40)] for nats in (4, 2)]
    gain, low, high = table.worth_gains(before, after)["a"]
    # A mean of 3 nats over 2 tokens, of half of the questions.
    assert gain == pytest.approx(0.75)
    # Its standard error is 0.75 / √40 = 0.119.
    assert low == pytest.approx(0.75 - 1.96 * 0.119, abs=0.05)
    assert high == pytest.approx(0.75 + 1.96 * 0.119, abs=0.05)
    shown = table.markdown(
        table.compare(measures(5.0, 6.0), [measures(3.0, 5.0)]), ["nll"], {"all": (gain, -1, 2)}
    )
    assert shown.endswith("| all | 5.00 → 3.00 (3.00 to 3.00) | +0.75 [-1.00, +2.00] |\n")


def test_gains_are_not_taken_between_different_questions():
    with pytest.raises(ValueError, match="not the same questions"):
        table.worth_gains([result("a", 1.0)], [[result("b", 1.0)]])


# ---- make longqa ----------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_longqa_trains_and_scores_only_what_is_missing(tmp_path):
    def touch(*names: str) -> None:
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()

    def commands() -> str:
        settings = [f"{name}={tmp_path / name}" for name in ("OUT", "LONGQA", "VENV")]
        done = subprocess.run(
            ["make", "--dry-run", "longqa", *settings],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout

    touch("VENV/.installed", "OUT/text/train.jsonl", "OUT/text/heldout.jsonl")
    planned = commands()
    for seed in (1, 2, 3):
        assert f"--seed {seed} --output-dir {tmp_path}/LONGQA/seed-{seed}\n" in planned
    assert planned.count("longqa.score") == 4
    touch(
        "LONGQA/train.stats.json",
        "LONGQA/heldout.stats.json",
        "LONGQA/extended/model.safetensors",
        "LONGQA/seed-1/adapter_model.safetensors",
        "LONGQA/seed-2/adapter_model.safetensors",
        "LONGQA/scores/base.json",
        "LONGQA/scores/seed-1.json",
    )
    planned = commands()
    assert planned.count("axolotl train") == 1
    assert "--seed 3 " in planned
    assert planned.count("longqa.score") == 2
    assert "seed-2=" in planned
    assert "longqa.table" in planned

"""The study's ×32: its facts, its base model, its rivals with short rows, and who comes near."""

import importlib
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

MODULES = ("claims", "cost", "data", "measure", "recall", "rivals", "settings", "train")


@pytest.fixture(scope="module")
def study():
    return SimpleNamespace(
        **{name: importlib.import_module(f"benchmarks.study.{name}") for name in MODULES}
    )


def test_facts_that_count_are_the_last_ones_of_their_name(study):
    recall = study.recall
    windows = torch.full((6, 256), recall.FILLER)
    ids, labels = recall.plant(windows, torch.Generator().manual_seed(0))
    for row, due in zip(ids.tolist(), labels.tolist(), strict=True):
        latest, asked = {}, 0
        for place, token in enumerate(row):
            if recall.FIRST_FACT <= token < recall.FIRST_NAME:
                latest[(token - recall.FIRST_FACT) // recall.VALUES] = token
                assert due[place] == study.data.IGNORED
            elif token >= recall.FIRST_NAME:
                assert due[place] == study.data.IGNORED
                assert due[place + 1] == latest[token - recall.FIRST_NAME]
                asked += 1
        assert len(latest) == recall.FACTS // recall.TOLD
        assert asked == 256 // recall.TOKENS_A_QUESTION


def test_recall_test_asks_each_name_for_its_last_fact(study):
    recall = study.recall
    windows = torch.full((6, 256), recall.FILLER)
    ids, answers, distances = recall.recall_test(windows, torch.Generator().manual_seed(0))
    for row, facts, back in zip(ids, answers, distances, strict=True):
        asked = (row >= recall.FIRST_NAME).nonzero().flatten()
        assert asked.tolist() == list(range(256 - 2 * len(facts), 256, 2))
        assert len(row[asked].unique()) == len(facts) == recall.FACTS // recall.TOLD
        for place, fact, distance in zip(asked, facts, back, strict=True):
            assert row[place - distance] == fact
            names = (row - recall.FIRST_FACT).div(recall.VALUES, rounding_mode="floor")
            same = (names == row[place] - recall.FIRST_NAME) & (row < recall.FIRST_NAME)
            assert same.nonzero().max() == place - distance


def test_skipped_positions_leave_one_stretch_out_and_the_second_chunk_sees_the_first(study):
    from transformers import LlamaConfig, LlamaForCausalLM

    generator = torch.Generator().manual_seed(0)
    positions = study.train.skipped_positions(50, 32, 256, generator)
    steps = positions.diff(dim=1)
    assert ((steps == 1).sum(1) >= 30).all()
    assert (positions[:, 0] == 0).all()
    assert 192 < positions.max() < 256
    model = LlamaForCausalLM(LlamaConfig(**study.recall.SHAPE))
    seen = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    ids = torch.randint(127, (1, 32))
    jump = torch.arange(32)[None] + 100 * (torch.arange(32) >= 16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    study.train.step_of(model, optimizer, ids, ids, jump, bf16=False)
    other = ids.clone()
    other[0, 0] += 1
    del seen[0]["labels"]
    with torch.no_grad():
        first, second = (model(**{**seen[0], "input_ids": x}).logits for x in (ids, other))
    assert not torch.equal(first[0, 16:], second[0, 16:])


SHORT = {"task": "recall", "attention": "full", "short_share": 0.5, "skipped": True}
SMALL = {"steps": 4, "target": 512, "short_rows": 128, "tokens_a_step": 1024}


def test_short_rows_come_first_and_cost_less(study):
    settings = study.settings.Settings(**SHORT, **SMALL)
    books = study.data.Books([torch.randint(127, (9000,))], [])
    rows = list(study.train.rows_of(settings, books))
    assert [tuple(row["ids"].shape) for row in rows] == [(8, 128)] * 2 + [(2, 512)] * 2
    assert ["positions" in row for row in rows] == [True, True, False, False]
    cost = study.cost.attention_cost(settings, full_steps=4)
    assert cost == pytest.approx(0.5 * 129 / 513 + 0.5)


def test_new_settings_name_new_runs_only(study):
    settings = study.settings.Settings()
    assert settings.key == "books-longlora-s2-yarn-0-42c80594"
    assert replace(settings, short_share=0.5).key != settings.key


def test_the_base_that_recalls_is_made_once(study, tmp_path, monkeypatch):
    recall = study.recall
    monkeypatch.setattr(recall, "STAGES", ((1, 1, 1e-3, 1), (2, 1, 1e-3, 1)))
    (tmp_path / "train.jsonl").write_text(json.dumps({"text": "été " * 2000}) + "\n")
    (tmp_path / "heldout.jsonl").write_text(json.dumps({"text": "a b " * 2000}) + "\n")
    books = recall.read_books(tmp_path)
    assert len(books.train[0]) == 2 * 2000, "what is no ASCII character is left out"
    made = recall.recall_base(tmp_path, books)
    assert (made / "model.safetensors").is_file()
    monkeypatch.delattr(recall, "pretrain")
    assert recall.recall_base(tmp_path, books) == made


@pytest.mark.parametrize(
    ("perplexity", "points", "cost", "verdict"),
    [
        ((0.5, 0.9), (-1.0, -2.9), 40.0, "yes"),
        ((0.5, 1.1), (-1.0, -3.1), 51.0, "no: perplexity, recall, cost"),
        ((0.5,), (2.0,), 40.0, "yes (one seed)"),
    ],
)
def test_near_full_attention_asks_every_seed(study, perplexity, points, cost, verdict):
    points = study.claims.Difference(points, "points")
    found = study.rivals.verdict(study.claims.Difference(perplexity), points, cost)
    assert found == verdict


def test_a_run_of_x32_is_measured_by_distance_and_in_short_rows(study, tmp_path, monkeypatch):
    from transformers import LlamaConfig, LlamaForCausalLM

    monkeypatch.setattr(study.measure, "WINDOWS", {"recall": 1})
    monkeypatch.setattr(study.measure, "SHORT_WINDOWS", 1)
    monkeypatch.setattr(study.measure, "RECALL_WINDOWS", 4)
    config = LlamaConfig(**study.recall.SHAPE, max_position_embeddings=64)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    text = [torch.randint(127, (9000,))]
    settings = study.settings.Settings(**SHORT, **SMALL)
    row = json.loads(json.dumps(study.train.run(settings, tmp_path, study.data.Books(text, text))))
    assert list(row["by_position"]) == ["0-64", "64-128", "128-256", "256-512"]
    assert list(row["recall"]["within"]) == ["64", "512"]
    assert sum(row["recall"]["answers"].values()) == 4 * study.recall.FACTS // study.recall.TOLD
    assert list(row["short"]["by_position"]) == ["0-64"]

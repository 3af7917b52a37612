"""The study's own parts: what it plants, counts, trains, judges and writes."""

import importlib
import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

MODULES = (
    *("base", "claims", "cost", "data", "measure", "plan", "report", "results"),
    *("rivals", "settings", "sinks", "timing", "train", "worker"),
)


@pytest.fixture(scope="module")
def study():
    return SimpleNamespace(
        **{name: importlib.import_module(f"benchmarks.study.{name}") for name in MODULES}
    )


def test_passkey_answers_stand_in_the_labels_only(study):
    alphabet = study.data.Alphabet.of([torch.arange(3, 700)], 700)
    windows = torch.arange(3, 259).repeat(4, 1)
    ids, labels = study.data.plant(windows, alphabet, torch.Generator().manual_seed(0))
    digits, cues = alphabet.digits.flatten(), alphabet.cues
    for row in range(4):
        where = torch.isin(ids[row], digits).nonzero().flatten()
        assert len(where) == study.data.DIGITS, "a digit stands where it is written, nowhere else"
        key = ids[row, where]
        assert (labels[row, where] == study.data.IGNORED).all()
        asked = torch.isin(ids[row], cues).nonzero().flatten()
        assert len(asked) == 256 // study.data.TOKENS_A_QUESTION
        assert (asked > where.max()).all()
        which = (ids[row, asked][:, None] == cues).int().argmax(1)
        assert torch.equal(labels[row, asked + 1], key[which])


def test_passkey_test_asks_for_every_digit_at_the_end(study):
    alphabet = study.data.Alphabet.of([torch.arange(3, 700)], 700)
    windows = torch.arange(3, 259).repeat(8, 1)
    ids, keys, starts = study.data.passkey_test(windows, alphabet, torch.Generator().manual_seed(0))
    assert torch.equal(ids[:, -study.data.DIGITS :], alphabet.cues.expand(8, -1))
    for row, key, start in zip(ids, keys, starts, strict=True):
        found = row.unfold(0, len(key), 1)
        assert (found == key).all(1).nonzero().tolist() == [[start]]


class Finder(torch.nn.Module):
    """A model with a known answer: it finds the digits if the window is short enough."""

    def __init__(self, alphabet, reach):
        super().__init__()
        self.alphabet, self.reach = alphabet, reach

    def forward(self, input_ids, use_cache, logits_to_keep):
        row = input_ids[0]
        key = row[torch.isin(row, self.alphabet.digits.flatten())]
        if len(row) > self.reach:
            key = key.roll(1)  # the right digits at the wrong places
        logits = torch.nn.functional.one_hot(key, 700).float()[None]
        return type("Output", (), {"logits": logits})


def test_retrieval_of_a_model_with_a_known_reach(study):
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(3, 600, (80_000,), generator=generator)
    alphabet = study.data.Alphabet.of([torch.arange(3, 700)], 700)
    books = study.data.Books([], [text], alphabet)
    found = study.measure.retrieval(Finder(alphabet, reach=512), books, 1024)
    assert found["exact"] == {256: 1.0, 512: 1.0, 1024: 0.0}
    assert found["digits"][1024] == found["far"] == 0.0
    assert 0 < found["far_digits"] < 4 * study.measure.RETRIEVAL_WINDOWS


def test_allowed_pairs_are_those_of_shifted_attention(study):
    from longlora_plugin.attention import shifted_sparse_attention

    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 3, 50, 8, dtype=torch.float64) for _ in range(3))
    mask = study.sinks.allowed(3, 50, 12)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask[None])
    found = shifted_sparse_attention(query, key, value, group_size=12)
    found = found if found.shape == expected.shape else found.transpose(1, 2)
    torch.testing.assert_close(found, expected)


def test_sinks_add_the_first_tokens_and_no_future(study):
    plain, sinks = study.sinks.allowed(2, 32, 8), study.sinks.allowed(2, 32, 8, sinks=3)
    added = sinks & ~plain
    assert added.any()
    assert not added[..., 3:].any()
    assert not sinks.triu(1).any()


def test_cost_counts_pairs(study):
    cost, settings = study.cost, study.settings.Settings(target=8, group=4)
    full = 8 * 9 / 2
    plain = 2 * (4 * 5 / 2)
    shifted = 3 + 10 + 3
    assert cost.sparse_share(settings) == pytest.approx((plain + shifted) / 2 / full)
    assert cost.sparse_share(replace(settings, attention="groups")) == pytest.approx(plain / full)
    assert cost.attention_cost(settings, full_steps=settings.steps) == 1.0
    sparse = cost.sparse_share(settings)
    one_layer = cost.attention_cost(replace(settings, full_layers=(0,)), 0)
    quarter = cost.attention_cost(settings, settings.steps // 4)
    assert one_layer == pytest.approx(0.25 + 0.75 * sparse) == pytest.approx(quarter)
    growing = cost.sparse_share(replace(settings, growing=(4, 4, 8)))
    eight = cost.sparse_share(replace(settings, group=8))
    assert growing == pytest.approx((2 * sparse + eight) / 3)


def test_groups_grow_in_equal_parts_of_the_steps_before_the_finish(study):
    settings = study.settings.Settings(steps=8, finish=0.25, growing=(256, 512, 1024), group=64)
    assert [settings.group_at(step) for step in range(6)] == [256, 256, 512, 512, 1024, 1024]
    assert replace(settings, growing=()).group_at(3) == 64


def test_every_run_has_a_name_of_its_own_and_main_rows_come_first(study):
    runs = study.plan.runs()
    keys = [settings.key for settings in runs]
    assert len(set(keys)) == len(keys)
    quick = study.plan.runs(quick=True)
    assert quick == runs[: len(quick)]
    assert {settings.seed for settings in quick} == {0}
    wanted = {s for q in study.plan.QUESTIONS for row in q.rows for s in row.runs()}
    assert set(runs) == wanted


def test_full_attention_steps_are_the_last_and_the_drawn(study):
    settings = study.settings.Settings(steps=20, finish=0.1)
    assert study.train.full_attention_steps(settings) == {18, 19}
    assert study.train.full_attention_steps(replace(settings, finish=0)) == set()
    drawn = study.train.full_attention_steps(replace(settings, finish=0, random_full=0.25))
    assert len(drawn) == 5
    assert study.train.full_attention_steps(replace(settings, attention="full")) == set(range(20))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, study):
    """A tiny Llama of context 256 and books for it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny")
    config = LlamaConfig(
        vocab_size=700,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    text = torch.randint(3, 650, (60_000,))
    alphabet = study.data.Alphabet.of([text], 700)
    return folder, study.data.Books([text], [text], alphabet)


@pytest.fixture
def few_windows(monkeypatch, study):
    monkeypatch.setattr(study.measure, "WINDOWS", dict.fromkeys(study.measure.WINDOWS, 2))
    monkeypatch.setattr(study.measure, "QUICK_WINDOWS", 1)
    monkeypatch.setattr(study.measure, "RETRIEVAL_WINDOWS", 2)


SHORT = {"steps": 4, "target": 512, "group": 128, "tokens_a_step": 1024}


@pytest.mark.parametrize(
    ("changes", "sparse_layers", "kinds"),
    [
        ({"finish": 0.5}, 2, {"sparse", "full"}),
        ({"attention": "full"}, 0, {"full"}),
        ({"attention": "groups"}, 2, {"sparse"}),
        ({"attention": "pose", "finish": 0.5}, 2, {"sparse", "full"}),
        ({"full_layers": (0,)}, 1, {"sparse"}),
        ({"growing": (64, 128), "finish": 0.5}, 2, {"sparse", "full"}),
        ({"attention": "sinks", "sinks": 16}, 2, {"sparse"}),
        ({"method": "full"}, 2, {"sparse"}),
        ({"method": "lora+norm", "task": "retrieval", "watch": (2,)}, 2, {"sparse"}),
        (
            {"attention": "full", "short_share": 0.5, "skipped": True, "short_rows": 128},
            0,
            {"full"},
        ),
    ],
)
def test_a_run_trains_as_its_settings_say(study, tiny, few_windows, changes, sparse_layers, kinds):
    settings = study.settings.Settings(**SHORT, **changes)
    row = json.loads(json.dumps(study.train.run(settings, *tiny)))
    assert row["sparse_layers"] == sparse_layers
    assert set(row["seconds_a_step"]) == kinds
    assert list(row["by_position"]) == ["0-256", "256-512"]
    assert ("evaluated_sparse" in row) == (
        settings.task == "books" and settings.attention in ("s2", "groups", "pose")
    )
    assert (
        list(row.get("watched", {}))
        == [str(step) for step in (*settings.watch, 4)][: 2 * bool(settings.watch)]
    )


def test_the_retrieval_base_is_made_once(study, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(study.base, "STAGES", ((32, 2), (64, 1)))
    made = study.base.retrieval_base(tiny[0], tmp_path, tiny[1])
    assert (made / "model.safetensors").is_file()
    monkeypatch.delattr(study.base, "_train")
    assert study.base.retrieval_base(tiny[0], tmp_path, tiny[1]) == made


def test_sparse_evaluation_differs_and_a_seed_repeats(study, tiny, few_windows):
    settings = study.settings.Settings(**SHORT)
    first, second = (study.train.run(settings, *tiny) for _ in range(2))
    assert first["perplexity"] == second["perplexity"]
    assert first["evaluated_sparse"]["perplexity"] != first["perplexity"]


def test_a_run_whose_sparse_attention_did_not_run_is_an_error(
    study, tiny, few_windows, monkeypatch
):
    settings = study.settings.Settings(**SHORT)
    monkeypatch.setattr(
        study.train.Attention, "train", lambda self, sparse, step: self.model.eval()
    )
    with pytest.raises(RuntimeError, match="ran 0 times, not 8"):
        study.train.run(settings, *tiny)


def test_steps_are_timed_alternately(study, tiny, monkeypatch):
    monkeypatch.setattr(study.timing, "ROUNDS", 1)
    monkeypatch.setattr(study.timing, "Settings", lambda: study.settings.Settings(**SHORT))
    timed = study.timing.alternate(*tiny)
    seconds = timed["seconds_a_step"]
    assert timed["s2_over_full"] == pytest.approx(seconds["s2"] / seconds["full"])


@pytest.mark.parametrize(
    ("of_seed", "verdict"),
    [
        ((2.0, 1.0, 3.0), "held"),
        ((2.0, -0.1, 3.0), "cannot be seen"),
        ((0.2, 0.1, 0.3), "cannot be seen"),
        ((-2.0, -1.0, -3.0), "did not hold"),
        ((2.0,), "held (one seed)"),
    ],
)
def test_verdicts_on_higher_ask_every_seed(study, of_seed, verdict):
    assert study.claims.Difference(of_seed).higher() == verdict


@pytest.mark.parametrize(
    ("of_seed", "verdict"),
    [
        ((0.4, 0.9, -3.0), "held"),
        ((0.4, 1.4), "cannot be seen"),
        ((2.0, 1.0), "did not hold"),
        ((3.0, -0.1), "cannot be seen"),
    ],
)
def test_verdicts_on_as_good_as_ask_every_seed(study, of_seed, verdict):
    assert study.claims.Difference(of_seed).equal() == verdict


def test_retrieval_is_judged_in_points(study):
    points = study.claims.Difference((4.0, 4.9), "points")
    assert points.equal() == "held"
    assert points.higher() == "cannot be seen"
    assert study.claims.Difference((9.0, 5.0), "points").higher() == "held"
    assert study.claims.Difference((9.0, 5.1), "points").equal() == "did not hold"
    assert points.text() == "+4.5 points (+4.0 to +4.9, 2 seeds)"


@pytest.mark.parametrize(
    ("perplexity", "recall", "cost", "said"),
    [
        ((0.9, -2.0), (-2.9, 1.0), 49.0, "yes"),
        ((0.9, -2.0), (-2.9, 1.0), 51.0, "no: cost"),
        ((1.1, -2.0), (-2.9, 1.0), 49.0, "in the mean; not every seed: perplexity"),
        ((0.9, -2.0), (-3.1, -2.0), 49.0, "in the mean; not every seed: recall"),
        ((0.9, -2.0), (-3.1, -3.0), 49.0, "no: recall"),
        ((1.2, 1.1), (-9.0, -9.0), 49.0, "no: perplexity, recall"),
        ((0.9,), (-2.9,), 49.0, "yes (one seed)"),
    ],
)
def test_near_is_said_of_every_seed_or_of_the_mean(study, perplexity, recall, cost, said):
    found = (study.claims.Difference(perplexity), study.claims.Difference(recall, "points"))
    assert study.rivals.verdict(*found, cost) == said


def rows_of(study, folder, perplexities):
    """Made rows: (row, seed) → perplexity."""
    (folder / "rows").mkdir()
    for (row, seed), perplexity in perplexities.items():
        settings = replace(row.settings, seed=seed)
        content = {
            "settings": settings.as_dict(),
            "perplexity": perplexity,
            "by_position": {"0-256": perplexity, "1024-2048": perplexity + 1},
            "seconds": 50.0,
            "trainable_parameters": 1000,
        }
        (folder / "rows" / f"{settings.key}.json").write_text(json.dumps(content))
    return study.results.Results(folder)


def test_the_page_has_means_ranges_and_verdicts(study, tmp_path):
    rows = {row.label: row for row in study.results.Results.question("methods").rows}
    lora, both = rows["LoRA r=8"], rows["LongLoRA (both)"]
    made = {(lora, seed): 50.0 + seed for seed in range(3)}
    made |= {(both, seed): 40.0 for seed in range(3)}
    results = rows_of(study, tmp_path, made)
    page = study.report.write_page(results, tmp_path / "page").read_text()
    assert page.startswith("# ")
    assert "| LoRA r=8 | 3 | 51.00 (50.00–52.00) |" in page
    assert "+27.5 % (+25.0 to +30.0, 3 seeds) | held |" in page
    assert (tmp_path / "page" / "study-methods.png").stat().st_size > 1000


def test_a_run_is_claimed_once_and_given_back(study, tmp_path):
    path = tmp_path / "row.json"
    with study.worker.claimed(path) as mine, study.worker.claimed(path) as also_mine:
        assert mine
        assert not also_mine
    with study.worker.claimed(path) as mine:
        assert mine, "an old mark of nobody is no claim"


def test_a_run_that_fails_costs_no_other_and_one_that_is_there_is_not_made(
    study, tmp_path, monkeypatch
):
    first, second, third = (study.settings.Settings(seed=seed) for seed in range(3))
    (tmp_path / "rows").mkdir()
    study.worker.file_of(tmp_path / "rows", third).write_text("{}")
    made = []

    def make(settings, path, out, text):
        made.append(settings)
        if settings == first:
            raise ValueError("no luck")

    monkeypatch.setattr(study.worker, "_make", make)
    with pytest.raises(SystemExit) as end:
        study.worker.work([first, second, third], tmp_path, tmp_path, None)
    assert end.value.code == 1
    assert made == [first, second]


def test_the_committed_page_is_what_its_rows_say(study, tmp_path, monkeypatch):
    committed = Path(__file__).parents[2] / "docs/explanation"
    everything = json.loads((committed / "study.json").read_text())
    (tmp_path / "rows").mkdir()
    for key, row in everything["rows"].items():
        assert study.settings.Settings(**read(row["settings"])).key == key
        (tmp_path / "rows" / f"{key}.json").write_text(json.dumps(row))
    (tmp_path / "timing.json").write_text(json.dumps(everything["timing"]))
    monkeypatch.setattr(study.report, "plot", lambda *arguments: None)
    page = study.report.write_page(study.results.Results(tmp_path), tmp_path / "page")
    assert page.read_text() == (committed / "study.md").read_text()
    images = re.findall(r"\((study-\S+\.png)\)", page.read_text())
    assert all((committed / image).is_file() for image in images)


def read(settings):
    return {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}

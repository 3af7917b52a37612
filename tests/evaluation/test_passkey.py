"""Passkey retrieval: trials that fit any tokenizer, and models whose score is known."""

import json
from functools import partial

import command
import pytest
import torch
from evaluation_models import ORIGINAL, random_mistral
from hypothesis import given, settings
from hypothesis import strategies as st
from json_keys import assert_documented
from transformers import AutoTokenizer, LlamaForCausalLM

from benchmarks.ruler.models import CopyModel
from longlora_plugin.evaluation import passkey
from longlora_plugin.evaluation.passkey import answer_trials, build_trial, is_exactly


@pytest.fixture(scope="module")
def tokenizer(work):
    return AutoTokenizer.from_pretrained(work / "base")


def answers_to(model, tokenizer, trials, **options):
    found = {}
    for batch, right in answer_trials(model, tokenizer, trials, **options):
        assert len({len(trial.prompt) for trial in batch}) == 1
        found |= {id(trial): answer for trial, answer in zip(batch, right, strict=True)}
    return [found[id(trial)] for trial in trials]


def test_model_that_copies_answers_every_trial(tokenizer):
    model = CopyModel(len(tokenizer))
    trials = [
        build_trial(tokenizer, 700, depth, number) for number, depth in enumerate([0, 0.5, 1])
    ]
    assert answers_to(model, tokenizer, trials, batch_size=2) == [True] * 3


def test_model_that_sees_only_the_end_answers_only_deep_needles(tokenizer):
    model = CopyModel(len(tokenizer), reach=250)
    early = [build_trial(tokenizer, 900, 0.0, number) for number in range(3)]
    late = [build_trial(tokenizer, 900, 1.0, number) for number in range(3)]
    answers = answers_to(model, tokenizer, early + late, batch_size=6)
    assert answers == [False] * 3 + [True] * 3


def test_random_model_answers_next_to_nothing(work, tokenizer):
    model = LlamaForCausalLM.from_pretrained(work / "base").eval()
    trials = [build_trial(tokenizer, 300, 0.5, number) for number in range(40)]
    assert sum(answers_to(model, tokenizer, trials, batch_size=8)) == 0


def test_no_batch_needs_a_mask(work, tokenizer):
    model, masks = LlamaForCausalLM.from_pretrained(work / "base").eval(), []
    model.model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
    )
    trials = [build_trial(tokenizer, 300, 0.5, number) for number in range(12)]
    assert len({len(trial.prompt) for trial in trials}) > 1
    answers_to(model, tokenizer, trials, batch_size=8)
    assert masks == [None] * len(masks)


@pytest.fixture(scope="module", params=["llama", "mistral, sliding window"])
def cached_model(request, work, tokenizer):
    if request.param == "llama":
        return LlamaForCausalLM.from_pretrained(work / "base").eval()
    return random_mistral(len(tokenizer))


def test_generated_answers_equal_greedy_decoding_without_cache(cached_model, tokenizer):
    trials = [build_trial(tokenizer, length, 0.3, 1) for length in (260, 300)]
    heard = []
    decode = tokenizer.batch_decode
    tokenizer.batch_decode = lambda ids, **options: (
        heard.extend(ids.tolist()) or decode(ids, **options)
    )
    try:
        answers_to(cached_model, tokenizer, trials)
    finally:
        del tokenizer.batch_decode
    for trial, answer in zip(trials, heard, strict=True):
        ids = list(trial.prompt)
        for token in answer:
            with torch.no_grad():
                assert cached_model(torch.tensor([ids])).logits[0, -1].argmax().item() == token
            ids.append(token)
            if token == tokenizer.eos_token_id:
                break


@settings(deadline=None, max_examples=30)
@given(
    length=st.integers(600, 1500),
    depth=st.one_of(st.just("random"), st.floats(0, 1)),
    number=st.integers(0, 10**6),
)
def test_prompt_fits_the_length_to_within_one_sentence(tokenizer, length, depth, number):
    trial = build_trial(tokenizer, length, depth, number)
    sentence = max(len(tokenizer(" " + text)["input_ids"]) for text in passkey.FILLER)
    assert length - sentence <= trial.tokens <= length
    text = tokenizer.decode(trial.prompt, skip_special_tokens=True)
    assert trial.number in text
    assert text.endswith(passkey.QUESTION)
    assert trial.tokens == len(tokenizer(f"{text} {trial.number}")["input_ids"])


@pytest.mark.parametrize(("early", "late"), [(10, 2), (2, 10), (7, 7)])
@pytest.mark.parametrize("length", [20, 26, 27, 119, 120, 121, 300])
def test_as_many_sentences_as_fit_whatever_their_lengths(early, late, length):
    def tokens_with(sentences):
        return 20 + early * min(sentences, 10) + late * max(0, sentences - 10)

    most = max(n for n in range(500) if tokens_with(n) <= length)
    assert passkey._most_that_fit(tokens_with, length) == most


def test_depth_places_the_needle(tokenizer):
    for depth in (0.0, 0.25, 0.5, 0.75, 1.0):
        trial = build_trial(tokenizer, 1200, depth, 3)
        text = tokenizer.decode(trial.prompt, skip_special_tokens=True)
        body = text[text.index("\n") : text.rindex("\n")]
        before = body.index(passkey.NEEDLE[:20]) / (len(body) - len(passkey.NEEDLE))
        assert before == pytest.approx(depth, abs=0.05)


def test_same_seed_is_the_same_trial_and_another_seed_another(tokenizer):
    trial = build_trial(tokenizer, 400, "random", 5, seed=7)
    assert build_trial(tokenizer, 400, "random", 5, seed=7) == trial
    assert build_trial(tokenizer, 400, "random", 5, seed=8).number != trial.number
    assert build_trial(tokenizer, 400, "random", 6, seed=7).number != trial.number


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        (" 48213", True),
        ("48213.", True),
        ("\n48213 is it", True),
        ("48213, or so", True),
        ("48213. 5 more", True),
        ("48213,678", False),
        ("48213.6", False),
        ("48213’000", False),
        ("48213-4", False),
        ("48213th", False),
        ("48213_0", False),
        (" 482134", False),
        (" 4821", False),
        (" the 48213", False),
        ("", False),
    ],
)
def test_exact_match_takes_the_number_and_nothing_else(answer, right):
    assert is_exactly(answer, "48213") is right


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 20}, r"Write a length of at least \d+"),
        ({"depth": 50.0}, "write 0.5 for 50 %"),
        ({"depth": float("inf")}, "depth inf: a depth is a share"),
        ({"depth": float("nan")}, "depth nan: a depth is a share"),
        ({"depth": -0.5}, "depth -0.5: a depth is a share"),
    ],
)
def test_senseless_grid_is_refused(tokenizer, options, message):
    arguments = {"length": 400, "depth": 0.5, "number": 0} | options
    with pytest.raises(ValueError, match=message):
        build_trial(tokenizer, **arguments)


run = partial(command.invoke, "passkey")


def test_command_writes_a_row_for_each_model_length_and_depth(work):
    out, plot = work / "rows.json", work / "plot.png"
    result = run(work / "recipe.yml", "--lengths", f"{4 * ORIGINAL},320", "--depths", "0,1",
                 "--trials", 3, "--json", out, "--plot", plot)  # fmt: skip
    assert result.exit_code == 0, result.output
    rows = json.loads(out.read_text())
    assert [(row["model"], row["length"], row["depth"]) for row in rows] == [
        (model, length, depth)
        for model in ("base", "base+rope", "adapter")
        for length in (256, 320)
        for depth in (0, 1)
    ]
    wilson = [(0.0, 0.5615), (0.0615, 0.7923), (0.2077, 0.9385), (0.4385, 1.0)]
    for row in rows:
        assert row["ci95"] == pytest.approx(wilson[row["correct"]], abs=1e-4)
        assert row["accuracy"] == row["correct"] / 3 == sum(a["right"] for a in row["answers"]) / 3
        assert row["length"] - 40 < row["tokens_least"] <= row["tokens_most"] <= row["length"]
    assert_documented("passkey", rows)
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "greedy decoding" in result.output


def test_command_keeps_the_rows_of_other_depths_lengths_and_seeds(work):
    out = work / "resume.json"
    arguments = [work / "recipe.yml", "--trials", 2, "--model", "base", "--json", out]
    assert run(*arguments, "--lengths", 300, "--depths", "0,random").exit_code == 0
    first = json.loads(out.read_text())
    result = run(*arguments, "--lengths", 300, "--depths", "0,1")
    assert "1 of 2 rows were already" in result.output
    assert {row["depth"] for row in json.loads(out.read_text())} == {0, "random", 1}
    assert run(*arguments, "--lengths", 280, "--depths", "0").exit_code == 0
    assert run(*arguments, "--lengths", 300, "--depths", "0", "--seed", 1).exit_code == 0
    rows = json.loads(out.read_text())
    assert len(rows) == 5
    assert all(row in rows for row in first)


def test_command_prints_only_json_to_standard_output_when_it_is_asked_to(work):
    result = run(work / "recipe.yml", "--lengths", 280, "--depths", 0, "--trials", 1, "--model",
                 "base", "--json", "-")  # fmt: skip
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.stdout)
    assert (row["model"], row["length"], row["depth"]) == ("base", 280, 0)
    assert "Passkey accuracy" in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--depths", "50"], "write 0.5 for 50 %"),
        (["--depths", "deep"], "write shares with commas"),
        (["--lengths", "10"], "Write a length of at least"),
        (["--model", "trained"], "no model 'trained' to evaluate"),
    ],
)
def test_command_refuses_with_one_clear_error(work, options, message):
    result = run(work / "recipe.yml", *options)
    assert result.exit_code != 0
    assert message in " ".join(result.output.split())
    assert "Traceback" not in result.output

"""`axolotl longlora eval` from a recipe to rows, on a tiny random Llama with an adapter."""

import json
import math
import os
import shutil
import subprocess
import sys
from functools import partial

import command
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from command import done
from evaluation_models import (
    ORIGINAL,
    TARGET,
    YARN,
    extended,
    own_perplexity,
    text_of,
    write_adapter,
    write_recipe,
)
from json_keys import assert_documented
from peft import PeftModel
from safetensors.numpy import load_file
from transformers import AutoTokenizer, LlamaForCausalLM

from longlora_plugin.artifacts.manifest import Manifest, write_manifest
from longlora_plugin.cli import longlora
from longlora_plugin.evaluation import lengths
from longlora_plugin.evaluation.loading import ModelSource


@pytest.fixture(scope="module")
def ids(work):
    tokenizer = AutoTokenizer.from_pretrained(work / "base")
    return torch.tensor([tokenizer((work / "data.txt").read_text())["input_ids"]])


run, refused = partial(done, "eval"), partial(command.refused, "eval")


def test_rows_of_three_models_equal_transformers_and_peft_in_a_loop(work, ids):
    out = work / "rows.json"
    result = run(
        work / "recipe.yml",
        "--data",
        work / "data.txt",
        "--lengths",
        f"{ORIGINAL},{TARGET}",
        "--stride",
        32,
        "--json",
        out,
        "--plot",
        work / "plot.png",
    )
    rows = {(row["model"], row["length"]): row for row in json.loads(out.read_text())}
    assert_documented("eval", list(rows.values()))
    assert list(rows) == [
        (model, length)
        for model in ("base", "base+rope", "adapter")
        for length in (ORIGINAL, TARGET)
    ]
    models = {
        "base": LlamaForCausalLM.from_pretrained(work / "base").eval(),
        "base+rope": extended(work / "base"),
        "adapter": PeftModel.from_pretrained(extended(work / "base"), work / "out").eval(),
    }
    for (name, length), row in rows.items():
        expected = own_perplexity(models[name], ids, length, 32)
        assert row["perplexity"] == pytest.approx(expected, rel=1e-4), (name, length)
        assert row["tokens"] == ids.shape[1] - 1
        low, high = row["ci95"]
        assert low < row["perplexity"] < high
        assert row["buckets"][0]["from"] == 0
        assert row["buckets"][-1]["to"] == length
        figure = row["perplexity"]
        assert (f"{figure:,.0f}" if figure >= 1000 else f"{figure:.2f}") in result.output
    figures = [row["perplexity"] for row in rows.values()]
    assert len({round(figure, 3) for figure in figures}) == len(figures)
    assert rows["adapter", TARGET]["rope_parameters"] == YARN
    assert (work / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_score_all_equals_the_average_over_every_window(work, ids):
    out = work / "all.json"
    run(work / "recipe.yml", "--data", work / "data.txt", "--lengths", 64, "--stride", 16,
        "--score", "all", "--model", "base", "--json", out)  # fmt: skip
    model = LlamaForCausalLM.from_pretrained(work / "base").eval()
    with torch.no_grad():
        losses = [
            model(input_ids=window, labels=window).loss.item()
            for start in range(0, ids.shape[1] - 64 + 1, 16)
            for window in [ids[:, start : start + 64]]
        ]
    (row,) = json.loads(out.read_text())
    assert row["perplexity"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-4)
    assert row["score"] == "all"


def test_second_run_keeps_rows_of_the_same_settings(work, monkeypatch):
    out = work / "resume.json"
    arguments = [work / "recipe.yml", "--data", work / "data.txt", "--json", out]
    run(*arguments, "--lengths", "64,128", "--model", "base")
    first = json.loads(out.read_text())
    loads = []
    load = ModelSource.load
    monkeypatch.setattr(
        ModelSource, "load", lambda self, *a: loads.append(self.label) or load(self, *a)
    )
    result = run(*arguments, "--lengths", "64,128", "--model", "base", "--model", "adapter")
    rows = json.loads(out.read_text())
    assert rows[:2] == first
    assert [row["model"] for row in rows] == ["base", "base", "adapter", "adapter"]
    assert loads == ["adapter"]
    assert "2 of 4 rows were already" in result.output
    run(*arguments, "--lengths", "64,128", "--model", "base", "--stride", 16)
    assert json.loads(out.read_text())[:4] == rows
    assert [row["stride"] for row in json.loads(out.read_text())[4:]] == [16, 16]
    assert loads == ["adapter", "base"]


def test_rows_of_other_lengths_and_models_stay_in_the_file(work):
    out = work / "kept.json"
    arguments = [work / "recipe.yml", "--data", work / "data.txt", "--json", out]
    run(*arguments, "--lengths", "64", "--model", "adapter")
    run(*arguments, "--lengths", "128", "--model", "base")
    rows = json.loads(out.read_text())
    assert [(row["model"], row["length"]) for row in rows] == [("adapter", 64), ("base", 128)]


def test_changed_lora_alpha_is_another_model(work, tmp_path):
    output, out = tmp_path / "out", tmp_path / "rows.json"
    shutil.copytree(work / "out", output)
    recipe = write_recipe(tmp_path / "r.yml", work / "base", output)
    arguments = [recipe, "--data", work / "data.txt", "--lengths", 64, "--model", "adapter",
                 "--json", out]  # fmt: skip
    run(*arguments)
    (before,) = json.loads(out.read_text())
    config = output / "adapter_config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps({**content, "lora_alpha": 8 * content["lora_alpha"]}))
    run(*arguments)
    (after,) = json.loads(out.read_text())
    assert abs(after["perplexity"] - before["perplexity"]) > 1e-3


def test_changed_config_of_a_merged_model_is_another_model(work, tmp_path):
    extended(work / "base").save_pretrained(tmp_path / "model")
    out = tmp_path / "rows.json"
    arguments = [work / "recipe.yml", "--data", work / "data.txt", "--lengths", 128, "--json", out,
                 "--model", f"mine={tmp_path / 'model'}"]  # fmt: skip
    run(*arguments)
    config = tmp_path / "model" / "config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps({**content, "rms_norm_eps": 0.5}))
    assert "already" not in run(*arguments).output


def test_killed_run_keeps_its_finished_rows(work, monkeypatch):
    out = work / "killed.json"
    arguments = [work / "recipe.yml", "--data", work / "data.txt", "--lengths", "64,128",
                 "--json", out]  # fmt: skip
    score = lengths.score_documents
    calls = []

    def dies_at_the_fourth(*args, **options):
        calls.append(options["length"])
        if len(calls) == 4:
            raise KeyboardInterrupt
        return score(*args, **options)

    monkeypatch.setattr(lengths, "score_documents", dies_at_the_fourth)
    assert CliRunner().invoke(longlora, ["eval", *map(str, arguments)]).exit_code != 0
    assert len(json.loads(out.read_text())) == 3
    run(*arguments)
    assert len(json.loads(out.read_text())) == 6
    assert len(calls) == 4 + 3


def test_retrained_adapter_is_measured_again(work, tmp_path):
    output = tmp_path / "out"
    write_adapter(work / "base", output)
    recipe = write_recipe(tmp_path / "r.yml", work / "base", output)
    out = tmp_path / "rows.json"
    arguments = [recipe, "--data", work / "data.txt", "--lengths", 64, "--json", out]
    run(*arguments)
    before = {row["model"]: row for row in json.loads(out.read_text())}
    model = PeftModel.from_pretrained(
        LlamaForCausalLM.from_pretrained(work / "base"), output, is_trainable=True
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5)
    model.save_pretrained(output)
    run(*arguments)
    after = {row["model"]: row for row in json.loads(out.read_text())}
    assert after["base"] == before["base"]
    assert after["adapter"]["perplexity"] != before["adapter"]["perplexity"]


def test_token_file_holds_every_loss(work, ids):
    out, tokens = work / "tokens.json", work / "tokens.safetensors"
    run(work / "recipe.yml", "--data", work / "data.txt", "--lengths", "64,256", "--json", out,
        "--tokens", tokens)  # fmt: skip
    tensors = load_file(tokens)
    assert tensors["token_id"].tolist() == ids[0, 1:].tolist()
    assert tensors["position"].tolist() == list(range(1, ids.shape[1]))
    for row in json.loads(out.read_text()):
        losses = tensors[f"{row['model']}/{row['length']}/nll"]
        assert math.exp(losses.astype(float).mean()) == pytest.approx(row["perplexity"], rel=1e-6)


def test_lengths_beyond_the_documents_are_skipped_with_a_note_or_refused(work, ids):
    out = work / "skip.json"
    result = run(work / "recipe.yml", "--data", work / "data.txt", "--lengths", "64,999999",
                 "--model", "base", "--json", out)  # fmt: skip
    assert [row["length"] for row in json.loads(out.read_text())] == [64]
    assert "no document reaches 999999 tokens" in result.output
    message = refused(work / "recipe.yml", "--data", work / "data.txt", "--lengths", "999999")
    assert f"has {ids.shape[1]} tokens" in message


def test_rows_of_all_lengths_score_the_same_tokens(work, tmp_path):
    documents = [(work / "data.txt").read_text(), text_of(60, seed=5), text_of(400, seed=6)]
    data, out = tmp_path / "data.jsonl", tmp_path / "rows.json"
    data.write_text("\n".join(json.dumps({"text": text}) for text in documents))
    result = run(work / "recipe.yml", "--data", data, "--lengths", "64,256", "--json", out,
                 "--model", "base")  # fmt: skip
    short, long = json.loads(out.read_text())
    assert short["documents"] == long["documents"] == 2
    assert short["tokens"] == long["tokens"]
    assert "2 of 3 documents have 256 tokens" in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lengths", "64", "--stride", "65"], "Write a stride of 1 to 64"),
        (["--lengths", "sixty"], "write whole numbers"),
        (["--lengths", "64", "--buckets", "9,3"], "bucket edges 9, 3 must rise"),
        (["--lengths", "64", "--buckets", "9"], "--buckets 9 is one edge; write all of them"),
        (["--lengths", "64", "--model", "merged"], "run axolotl merge-lora"),
        (["--lengths", "64", "--model", "bsae"], "unknown model 'bsae'"),
        (["--model", "x="], "--model x=: write NAME=FOLDER"),
        (["--model", "=folder"], "--model =folder: write NAME=FOLDER"),
        (["--lengths", "64", "--adapter", "nowhere"], "give the folder that training wrote"),
        (["--lengths", "64", "--model", "x=nowhere"], "neither a model folder nor"),
        (["--lengths", "64", "--model", "x=~/nowhere"], "neither a model folder nor"),
        (["--lengths", "64", "--data", "~/nowhere.txt"], "no file or folder ~/nowhere.txt"),
        (["--lengths", "64", "--json", "/proc/rows.json"], "cannot write /proc/rows.json"),
        (["--lengths", "64", "--json", "/"], "cannot write /: it is a folder"),
        (["--lengths", "64", "--plot", "/dev/null/x.png"], "cannot write /dev/null/x.png"),
    ],
)
def test_wrong_options_are_one_clear_error(work, options, message):
    output = refused(work / "recipe.yml", "--data", work / "data.txt", *options)
    assert message in " ".join(output.split())
    assert "Traceback" not in output


def test_held_out_of_the_recipe_is_the_default_data(work, tmp_path):
    recipe = write_recipe(
        tmp_path / "r.yml",
        work / "base",
        work / "out",
        longlora={"rope": "yarn", "held_out": str(work / "data.txt")},
        test_datasets=[{"path": "elsewhere.txt"}],
    )
    out = tmp_path / "rows.json"
    run(recipe, "--lengths", 64, "--model", "base", "--json", out)
    assert json.loads(out.read_text())[0]["data"] == str(work / "data.txt")


def test_json_on_standard_output_is_nothing_but_json(work):
    result = run(work / "recipe.yml", "--data", work / "data.txt", "--lengths", 64, "--model",
                 "base", "--json", "-")  # fmt: skip
    assert [row["length"] for row in json.loads(result.stdout)] == [64]
    assert "Perplexity by context length" in result.stderr


def test_device_as_json_file_stays_a_device(work):
    run(work / "recipe.yml", "--data", work / "data.txt", "--lengths", 64, "--model", "base",
        "--json", "/dev/null")  # fmt: skip
    assert not os.path.isfile("/dev/null")


def test_no_data_is_refused_and_test_datasets_are_the_default(work, tmp_path):
    assert "Give --data" in refused(work / "recipe.yml")
    recipe = write_recipe(
        tmp_path / "r.yml",
        work / "base",
        work / "out",
        test_datasets=[{"path": str(work / "data.txt")}],
    )
    out = tmp_path / "rows.json"
    run(recipe, "--lengths", 64, "--model", "base", "--json", out)
    assert json.loads(out.read_text())[0]["data"] == str(work / "data.txt")


def test_file_that_is_no_result_is_not_overwritten(work, tmp_path):
    out = tmp_path / "notes.json"
    out.write_text('{"mine": 1}')
    message = refused(
        work / "recipe.yml", "--data", work / "data.txt", "--lengths", 64, "--json", out
    )
    assert "not a list of result rows" in message
    assert out.read_text() == '{"mine": 1}'


def test_default_lengths_run_from_the_original_context_to_the_target(work):
    out = work / "default.json"
    run(work / "recipe.yml", "--data", work / "data.txt", "--model", "base", "--json", out)
    assert [row["length"] for row in json.loads(out.read_text())] == [64, 128, 256]
    assert [row["stride"] for row in json.loads(out.read_text())] == [32, 64, 128]


def test_default_lengths_follow_the_run_where_the_recipe_says_another_length_by_now(work, tmp_path):
    adapter = shutil.copytree(work / "out", tmp_path / "run")
    write_manifest(adapter, Manifest(str(work / "base"), TARGET // 2, base_context=ORIGINAL))
    out = tmp_path / "rows.json"
    run(work / "recipe.yml", "--data", work / "data.txt", "--adapter", adapter, "--model", "base",
        "--json", out)  # fmt: skip
    rows = json.loads(out.read_text())
    assert [row["length"] for row in rows] == [ORIGINAL, TARGET // 2]
    assert {row["target_context"] for row in rows} == {TARGET // 2}


def test_stride_above_a_short_length_reads_that_one_without_overlap(work, ids):
    out = work / "strides.json"
    run(work / "recipe.yml", "--data", work / "data.txt", "--lengths", "64,256", "--stride", 128,
        "--model", "base", "--json", out)  # fmt: skip
    rows = json.loads(out.read_text())
    assert [row["stride"] for row in rows] == [64, 128]
    assert [row["tokens"] for row in rows] == [ids.shape[1] - 1] * 2


def test_two_processes_give_the_rows_of_one(work):
    common = ["eval", work / "recipe.yml", "--data", work / "data.txt", "--lengths", "64,256",
              "--batch-size", 2]  # fmt: skip
    alone = work / "one.json"
    run(*common[1:], "--json", alone)
    together = work / "two.json"
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    output = work / "processes.log"
    with output.open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--standalone",
             "--nproc_per_node", "2", "-m", "longlora_plugin.cli",
             *map(str, [*common, "--json", together])],
            env=environment, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            code = process.wait(timeout=240)
        finally:
            if process.poll() is None:
                process.terminate()  # the launcher then ends the processes it started
                process.wait(timeout=60)
    assert code == 0, output.read_text()[-3000:]
    assert output.read_text().count("Perplexity by context length") == 1
    for one, two in zip(
        json.loads(alone.read_text()), json.loads(together.read_text()), strict=True
    ):
        assert two["processes"] == 2
        assert two["perplexity"] == pytest.approx(one["perplexity"], rel=1e-9)
        assert two["buckets"] == one["buckets"]
        assert two["settings"] == one["settings"]

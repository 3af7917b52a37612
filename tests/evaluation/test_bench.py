"""`axolotl longlora bench`: lm-eval's own figures, models of a known score, no silent cut."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import bench_models
import pytest
import tiny
import torch
import yaml
from bench_models import ALONE, Source, bench, of_half_the_keys
from click.testing import CliRunner
from evaluation_models import write_recipe
from json_keys import assert_documented
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.ruler.models import Retriever
from longlora_plugin.cli import longlora
from longlora_plugin.evaluation.bench import Bench, CountingLM
from longlora_plugin.evaluation.loading import LoadedModel
from longlora_plugin.evaluation.options import BenchOptions
from longlora_plugin.evaluation.suites import RULER_OFFLINE
from longlora_plugin.evaluation.sweep import NotMeasurable
from longlora_plugin.evaluation.tables import effective_length

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Byte-level BPE over text like RULER's, so that short lengths hold a whole question."""
    from lm_eval.tasks.ruler import prepare_niah

    draw = random.Random(0)
    text = [
        prepare_niah.NEEDLE.format(type_needle_v="numbers", key=key, value=draw.randrange(10**7))
        for key in draw.sample(prepare_niah.WORDS, 400)
    ]
    text += [
        "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.",
        "Memorize and track the chain(s) of variable assignment hidden in the following text.",
        "Question: Find all variables that are assigned the value in the text above. VAR = VAR",
        "Some special magic numbers are hidden within the following text. Make sure to memorize.",
    ] * 50
    made = tiny.byte_tokenizer(*text, special_tokens=["<pad>", "</s>"], size=900)
    folder = tmp_path_factory.mktemp("bench") / "base"
    made.save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.fixture(scope="module")
def base(tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,
        eos_token_id=1,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(tokenizer.name_or_path)
    return tokenizer.name_or_path


@pytest.fixture(scope="module")
def recipe(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench-recipe")
    return write_recipe(folder / "r.yml", base, folder / "out", sequence_len=512, adapter=None)


def test_model_that_copies_scores_a_hundred_and_a_random_one_nothing(tokenizer, base):
    tasks, lengths = ["niah_single_1"], [512, 768]
    copied = bench(Retriever(tokenizer), tokenizer, tasks, lengths)
    assert [(row["task"], row["length"], row["score"]) for row in copied] == [
        ("niah_single_1", 512, 1.0),
        ("niah_single_1", 768, 1.0),
    ]
    assert [row["stderr"] for row in copied] == [0, 0]
    assert effective_length(copied, 0.856) == 768
    random_model = LlamaForCausalLM.from_pretrained(base).eval()
    rows = bench(random_model, tokenizer, tasks, lengths)
    assert [row["score"] for row in rows] == [0, 0]
    assert effective_length(rows, 0.856) is None


def test_two_processes_give_the_figures_of_one(tokenizer):
    alone = of_half_the_keys(tokenizer.name_or_path, ALONE)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--standalone", bench_models.__file__, tokenizer.name_or_path]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert run.returncode == 0, run.stderr
    together = json.loads(run.stdout.splitlines()[-1])
    assert [row["examples"] for row in alone] == [7]
    assert 0 < alone[0]["score"] < 1
    where = {"seconds", "processes", "device"}
    assert [{k: v for k, v in row.items() if k not in where} for row in together] == [
        {k: v for k, v in row.items() if k not in where} for row in alone
    ]


def test_length_that_no_text_fits_is_a_note_and_never_hangs(tokenizer, base):
    model, told = LlamaForCausalLM.from_pretrained(base).eval(), []
    source = Source(label="model", model=model, own_tokenizer=tokenizer, tokenizer="")
    options = BenchOptions(tasks=RULER_OFFLINE, lengths=(64,), limit=1)
    experiment = Bench({"model": tokenizer}, options, ALONE)
    for task in RULER_OFFLINE:
        with pytest.raises(NotMeasurable, match=f"{task} at 64: no row"):
            experiment.measure(
                source.load("cpu", None), {"task": task, "length": 64}, lambda *_: told.append(1)
            )


def requests(tokenizer, tokens, room):
    text = " a" * tokens
    while len(tokenizer(text)["input_ids"]) > tokens:
        text = text[:-1]
    assert len(tokenizer(text)["input_ids"]) == tokens
    return [SimpleNamespace(args=(text, {"until": [], "max_gen_toks": room, "do_sample": False}))]


@pytest.mark.parametrize(
    ("tokens", "grows", "truncated", "beyond"),
    [(64, False, 0, 1), (65, False, 1, 1), (65, True, 0, 1), (60, True, 0, 0), (61, True, 0, 1)],
)
def test_text_one_token_too_long_is_counted(tokenizer, base, tokens, grows, truncated, beyond):
    model, read = LlamaForCausalLM.from_pretrained(base).eval(), []
    model.get_input_embeddings().register_forward_pre_hook(
        lambda module, args: read.append(args[0].shape[1])
    )
    loaded = LoadedModel(Source(), model, tokenizer, torch.device("cpu"), torch.float32)
    counting = CountingLM(
        loaded, 64, grows=grows, batch_size=1, processes=ALONE, progress=lambda *_: None
    )
    counting.generate_until(requests(tokenizer, tokens, room=4))
    assert read[0] == (64 if truncated else tokens)
    counted = counting.counted()
    assert (counted["truncated"], counted["beyond_length"]) == (truncated, beyond)
    assert counted["longest_prompt"] == tokens


def test_likelihood_one_token_too_long_is_counted(tokenizer, base):
    model = LlamaForCausalLM.from_pretrained(base).eval()
    loaded = LoadedModel(Source(), model, tokenizer, torch.device("cpu"), torch.float32)
    for prompt, truncated in ((63, 0), (64, 1)):
        counting = CountingLM(
            loaded, 64, grows=False, batch_size=1, processes=ALONE, progress=lambda *_: None
        )
        ids = list(range(10, 10 + prompt))
        counting._loglikelihood_tokens([(("a", "b"), ids, [5, 6])], disable_tqdm=True)
        assert counting.counted()["truncated"] == truncated


ONE_PROCESS = """
import json, sys
from lm_eval.__main__ import cli_evaluate
for command in json.loads(sys.argv[1]):
    sys.argv = command
    cli_evaluate()
"""


def test_rows_equal_the_figures_of_lm_evals_own_command_line(recipe, base, tmp_path):
    out = tmp_path / "rows.json"
    tasks = ["niah_single_1", "ruler_fwe"]
    result = CliRunner().invoke(
        longlora,
        ["bench", str(recipe), "--tasks", ",".join(tasks), "--lengths", "512", "--limit", "4",
         "--model", "base", "--json", str(out), "--output-path", str(tmp_path / "as-lm-eval"),
         "--eval-results", str(tmp_path / "hub"), "--plot", str(tmp_path / "plot.png")],
    )  # fmt: skip
    assert result.exit_code == 0, (result.output, result.exception)
    rows = {row["task"]: row for row in json.loads(out.read_text())}
    assert_documented("bench", list(rows.values()))
    assert list(rows) == tasks
    commands = [
        ["lm_eval", "--model", "hf", "--tasks", task, "--limit", "4",
         "--model_args", f"pretrained={base},dtype=float32,max_length={row['max_length']}",
         "--metadata", '{"max_seq_lengths": [512]}', "--device", "cpu",
         "--output_path", str(tmp_path / f"cli-{task}"), "--log_samples"]
        for task, row in rows.items()
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", ONE_PROCESS, json.dumps(commands)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for task, row in rows.items():
        (written,) = (tmp_path / f"cli-{task}").rglob("results_*.json")
        theirs = json.loads(written.read_text())
        assert theirs["results"][task]["512,none"] == row["score"]
        ours = [
            json.loads(path.read_text()) for path in (tmp_path / "as-lm-eval").rglob("results_*")
        ]
        (same,) = (each for each in ours if task in each["results"])
        assert same["results"][task] == theirs["results"][task]
        assert same["task_hashes"] == theirs["task_hashes"]
    assert rows["ruler_fwe"]["beyond_length"] == 4
    assert rows["ruler_fwe"]["truncated"] == 0
    assert "none was cut" in " ".join(result.output.split())
    assert "effective length of base" in result.output
    (entry, _) = yaml.safe_load((tmp_path / "hub/.eval_results/longlora.yaml").read_text())
    assert entry["dataset"] == {"id": "NVIDIA/RULER", "task_id": "niah_single_1_512"}
    assert entry["value"] == 100 * rows["niah_single_1"]["score"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "niah_singel_1"], "did you mean niah_single_1?"),
        (["--tasks", "longbench2", "--lengths", "512"], "ruler-offline needs no data"),
        (["--tasks", "ruler-offline", "--lengths", "64"], "no task fits any of these lengths"),
        (["--tasks", ","], "names nothing"),
    ],
)
def test_what_cannot_run_is_one_clear_error(recipe, options, message):
    result = CliRunner().invoke(longlora, ["bench", str(recipe), "--model", "base", *options])
    assert result.exit_code != 0
    assert isinstance(result.exception, SystemExit)
    assert message in " ".join(result.output.split())


def test_benchmarks_of_their_authors_are_commands_for_the_merged_model(recipe):
    names = "helmet,nolima,longbench-original"
    result = CliRunner().invoke(longlora, ["bench", str(recipe), "--tasks", names])
    assert result.exit_code == 0, result.output
    for text in ("axolotl merge-lora", "/out/merged", "HELMET", "NoLiMa", "LongBench", "License"):
        assert text in result.output

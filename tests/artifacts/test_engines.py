"""serve-check: what it says of folders as training and merging save them, and as they once did."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from axolotl_runs import CONTEXT, TARGET, make_adapter
from click.testing import CliRunner
from json_keys import assert_documented
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from benchmarks.engines.models import OPTIONS, TYPES
from longlora_plugin.artifacts.callback import name_for_older_readers
from longlora_plugin.artifacts.engines import ENGINES, describe, judge, matrix
from longlora_plugin.artifacts.manifest import Manifest, write_manifest
from longlora_plugin.artifacts.trial import is_equal, perplexity_ratio, score_all
from longlora_plugin.cli import longlora
from longlora_plugin.rope import apply_rope, keep_both_spellings, resolve_rope

NAMES = [engine.name for engine in ENGINES]


@pytest.fixture
def saved(tmp_path, tiny_model_dir):
    """Function (preset, both spellings) → a folder as a merge leaves it."""
    base = tiny_model_dir("served", initializer_range=0.2)

    def make(preset: str = "yarn", both: bool = True) -> Path:
        folder = tmp_path / preset
        model = AutoModelForCausalLM.from_pretrained(base)
        apply_rope(model.config, resolve_rope(preset, AutoConfig.from_pretrained(base), TARGET))
        if both:
            keep_both_spellings(model.config)
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(base).save_pretrained(folder)
        name_for_older_readers(folder)
        write_manifest(folder, Manifest(str(base), TARGET, base_context=CONTEXT))
        return folder

    return make


def verdicts(folder: Path) -> dict[str, str]:
    return {engine.name: judge(engine, describe(folder)).verdict for engine in ENGINES}


def reason(name: str, folder: Path) -> str:
    engine = next(each for each in ENGINES if each.name == name)
    return judge(engine, describe(folder)).reason


def test_a_folder_that_is_not_there_is_told(tmp_path):
    with pytest.raises(ValueError, match="there is no folder"):
        describe(tmp_path / "nowhere")


@pytest.mark.parametrize("maximum", ["Infinity", "NaN", '"4k"', "null", "-1"])
def test_a_maximum_that_is_no_number_of_tokens_is_one_error(tmp_path, maximum):
    config = '{"model_type": "llama", "max_position_embeddings": %s}'
    (tmp_path / "config.json").write_text(config % maximum)
    with pytest.raises(ValueError, match=r"max_position_embeddings.*a whole number of tokens"):
        describe(tmp_path)


@pytest.mark.parametrize("preset", ["yarn", "linear"])
def test_the_recommended_presets_are_equal_in_every_engine_that_was_tried(saved, preset):
    found = verdicts(saved(preset))
    assert {name: each for name, each in found.items() if each not in ("equal", "not tried")} == {}
    assert sorted(name for name, each in found.items() if each == "not tried") == [
        "exllamav3",
        "lmdeploy",
        "sglang",
    ]


def test_every_command_names_the_folder_and_the_context_where_the_engine_takes_one(saved):
    folder = saved()
    for engine in ENGINES:
        command = judge(engine, describe(folder)).command
        assert command is not None
        assert str(folder) in command
        if "{context}" in engine.command:
            assert str(TARGET) in command


def test_a_config_with_the_new_spelling_only_is_said_to_lose_the_context(saved):
    folder = saved(both=False)
    found = verdicts(folder)
    assert {name for name, each in found.items() if each == "different"} == {
        "transformers-4",
        "mlx-lm",
    }
    assert "lost without an error" in reason("mlx-lm", folder)


def test_a_tokenizer_class_of_transformers_5_is_refused_by_transformers_4(saved):
    folder = saved()
    path = folder / "tokenizer_config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "tokenizer_class": "TokenizersBackend"}))
    assert verdicts(folder)["transformers-4"] == "refused"
    assert name_for_older_readers(folder)
    assert not name_for_older_readers(folder)
    assert verdicts(folder)["transformers-4"] == "equal"
    assert len(AutoTokenizer.from_pretrained(folder)("ka lo")["input_ids"]) > 1


def test_dynamic_is_not_called_right_where_it_was_measured_wrong(saved):
    found = verdicts(saved("dynamic"))
    assert found["vllm"] == "different"
    assert found["exllamav3"] == "refused"


def test_an_adapter_with_trained_embeddings_is_for_transformers_only(tmp_path, tiny_model_dir):
    make_adapter(tiny_model_dir("served-adapter", tie_word_embeddings=True), tmp_path / "run")
    found = verdicts(tmp_path / "run")
    assert found["vllm"] == found["llama.cpp"] == found["sglang"] == "refused"
    assert "merge-lora" in reason("vllm", tmp_path / "run")
    (tmp_path / "run" / "merged").mkdir()
    assert str(tmp_path / "run" / "merged") in reason("vllm", tmp_path / "run")


def test_an_adapter_of_lora_alone_is_served_by_vllm_with_its_rope(tmp_path, tiny_model_dir):
    make_adapter(tiny_model_dir("served-adapter", tie_word_embeddings=True), tmp_path / "run")
    path = tmp_path / "run" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "modules_to_save": None}))
    engine = next(each for each in ENGINES if each.name == "vllm")
    command = judge(engine, describe(tmp_path / "run")).command
    assert command is not None
    overrides = json.loads(command.split("--hf-overrides '")[1].split("'")[0])
    config = AutoConfig.from_pretrained(tmp_path / "run")
    assert overrides["rope_parameters"] == config.rope_parameters
    assert overrides["max_position_embeddings"] == config.max_position_embeddings


def test_the_matrix_has_every_preset_in_every_engine_that_can_be_tried():
    engines = {engine.measured_as for engine in ENGINES if engine.measured_as} - {"transformers-5"}
    assert {
        (engine, "llama", preset) for engine in engines for preset in OPTIONS
    } <= matrix().keys()
    assert {model_type for _, model_type, _ in matrix()} == set(TYPES)
    assert all(row["version"] for row in matrix().values())
    for engine in engines:
        for rope in ("yarn", "linear", "theta"):
            assert matrix()[engine, "llama", rope]["verdict"] == "equal"


def of_type(folder: Path, model_type: str) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": model_type}))
    return folder


def test_a_model_type_that_was_not_tried_is_not_called_right(saved):
    found = verdicts(of_type(saved(), "qwen2_moe"))
    assert found["vllm"] == found["llama.cpp"] == found["transformers-4"] == "not tried"
    assert found["mlx-lm"] == "different"
    assert "takes θ alone" in reason("mlx-lm", of_type(saved(), "qwen2_moe"))
    assert verdicts(of_type(saved("linear"), "gemma2"))["mlx-lm"] == "different"


def test_rows_are_written_as_json(saved):
    done = CliRunner().invoke(longlora, ["serve-check", str(saved()), "--json", "-"])
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)
    assert [row["engine"] for row in rows] == NAMES
    assert_documented("serve-check", rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--engine", "vlm"], "unknown engine 'vlm'; did you mean vllm? engines: transformers-5"),
        (["--run", "--python", "vllm"], "write ENGINE=PATH"),
        (["--run", "--python", "vllm=/nowhere"], "write ENGINE=PATH"),
        (["--python", f"vllm={sys.executable}"], "with --run only"),
    ],
)
def test_wrong_options_are_one_error(saved, options, message):
    done = CliRunner().invoke(longlora, ["serve-check", str(saved()), *options])
    assert done.exit_code == 1
    assert message in " ".join(done.output.split())


def test_a_folder_without_a_config_is_one_error(tmp_path):
    done = CliRunner().invoke(longlora, ["serve-check", str(tmp_path)])
    assert done.exit_code == 1
    assert "no config.json" in done.output


def test_with_run_the_folder_itself_is_scored(saved):
    folder = saved()
    options = ["--engine", "transformers-5", "--run", "--json", "-"]
    done = CliRunner().invoke(longlora, ["serve-check", str(folder), *options])
    assert done.exit_code == 0, done.output
    (row,) = json.loads(done.stdout)
    assert row["verdict"] == "equal"
    assert row["inside"] == row["beyond"] == 1.0
    assert row["basis"].startswith("tried here with")


def test_another_rope_in_an_engine_is_seen_and_a_failure_is_told(saved):
    import torch

    yarn, linear = saved("yarn"), saved("linear")
    torch.manual_seed(0)
    tokens = torch.randint(3, 200, (2 * CONTEXT,)).tolist()
    one, other = score_all("transformers-5", sys.executable, [yarn, linear], tokens)
    assert len(one["scores"]) == len(tokens) - 1
    ratio = perplexity_ratio(one["scores"], other["scores"], CONTEXT, len(tokens))
    assert not is_equal(ratio)
    assert is_equal(1.002, engine="vllm")
    assert not is_equal(1.002, engine="transformers-4")
    (yarn / "config.json").write_text("{}")
    (failed,) = score_all("transformers-5", sys.executable, [yarn], tokens)
    assert "Error" in failed["error"]

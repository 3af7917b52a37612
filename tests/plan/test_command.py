"""`plan` as a command, and its GPUs."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from json_keys import assert_documented
from plan_material import invoke, tiny_llama, write_recipe
from rich.console import Console
from transformers import LlamaConfig

from benchmarks.paper import print_paper
from longlora_plugin.plan.gpus import GPUS, find_gpu
from longlora_plugin.plan.planner import fits, largest_sequence_len, planned_run
from longlora_plugin.run.recipe import read_recipe


@pytest.mark.parametrize(
    ("name", "size"), [("48gb", 48), ("48", 48), ("80 GB", 80), ("11.5GiB", 11.5)]
)
def test_a_plain_size_is_a_gpu(name: str, size: float) -> None:
    assert find_gpu(name).memory == size


def test_an_unknown_gpu_is_an_error_naming_the_valid_ones() -> None:
    with pytest.raises(ValueError, match=r"a100-40gb or a100-80gb\?.*mi300x-192gb"):
        find_gpu("a100")
    for name in ("4090", "rtx4090"):
        with pytest.raises(ValueError, match=r"did you mean rtx4090-24gb\?"):
            find_gpu(name)
    with pytest.raises(ValueError, match="unknown GPU ''; valid"):
        find_gpu("")
    assert find_gpu("A100_80GB") is GPUS["a100-80gb"]


def test_the_largest_length_fits_and_the_next_one_does_not(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, LlamaConfig(), adapter="longlora", gradient_checkpointing=True)
    run = planned_run(read_recipe(recipe), LlamaConfig(), gpus=8)
    for card in (GPUS["a100-40gb"], GPUS["h200-141gb"]):
        longest = largest_sequence_len(run, card)
        assert longest % 256 == 0
        assert longest > 4096
        assert fits(run.memory_at(longest), card)
        assert not fits(run.memory_at(longest + 256), card)
    assert largest_sequence_len(run, GPUS["t4-16gb"]) == 0


def test_the_command_writes_json_and_a_picture(tmp_path: Path) -> None:
    recipe = write_recipe(
        tmp_path, tiny_llama(), adapter="longlora", sequence_len=4096, gradient_checkpointing=True
    )
    figures, picture = tmp_path / "plan.json", tmp_path / "plan.png"
    result = invoke(
        recipe, "--gpu", "rtx4090-24gb", "--gpus", 2, "--json", figures, "--plot", picture
    )
    assert result.exit_code == 0, result.output
    assert "fits 2 × rtx4090-24gb" in result.output
    written = json.loads(figures.read_text())
    assert_documented("plan", written)
    assert written["parameters"]["trained"] == written["parameters"]["lora"] + (500 + 7) * 64
    for kind in ("full", "s2"):
        parts = written["flops"][kind]
        assert parts.pop("total") == pytest.approx(sum(parts.values()))
        assert set(parts) == {"attention", "projections", "ffn", "others"}
    assert written["fits"] is True
    assert written["group_size"] == 1024
    assert written["largest_sequence_len"] > written["comfortable_sequence_len"] > 4096
    assert written["speedup"] > 1
    assert written["memory"]["total"] > written["memory"]["needed"]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_run_whose_fragments_do_not_fit_is_called_tight(tmp_path: Path) -> None:
    recipe = write_recipe(
        tmp_path, LlamaConfig(), adapter="longlora", sequence_len=32768,
        gradient_checkpointing=True, load_in_4bit=True,
    )  # fmt: skip
    result = invoke(recipe, "--gpu", "32gb", "--json", tmp_path / "plan.json")
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["memory"]["needed"] < 32 < written["memory"]["total"]
    assert (written["fits"], written["tight"]) == (True, True)
    assert written["comfortable_sequence_len"] < 32768 <= written["largest_sequence_len"]
    assert "may just fit 1 × 32gb" in result.output


def test_a_recipe_that_does_not_fit_says_so_and_exits_with_0(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, LlamaConfig(), sequence_len=65536)
    result = invoke(recipe, "--gpu", "24gb", "--json", tmp_path / "plan.json")
    assert result.exit_code == 0, result.output
    assert "does not fit 1 × 24gb" in result.output
    written = json.loads((tmp_path / "plan.json").read_text())
    assert (written["fits"], written["largest_sequence_len"]) == (False, 0)


def test_without_a_gpu_every_known_one_is_answered(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_llama())
    result = invoke(recipe, "--json", tmp_path / "plan.json")
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["sequence_len"] == 512
    assert written["fits"] is None
    assert [row["gpu"] for row in written["by_gpu"]] == list(GPUS)


def test_the_papers_page_prints_both_tables_and_the_answer() -> None:
    out = Console(file=io.StringIO(), width=120)
    figures = print_paper(out)
    printed = out.file.getvalue()
    assert printed.count("the same") == 8
    assert "out of memory" in printed
    assert "102400" in printed
    assert len(figures["table_12"]) == 12
    assert [goal["fits"] for goal in figures["reach"]] == [True, True, True]


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "gemma2", "phi3"])
@pytest.mark.parametrize(
    "wrong",
    [
        {"hidden_size": 0},
        {"num_hidden_layers": 0},
        {"num_hidden_layers": 10**9},
        {"num_attention_heads": 0},
        {"vocab_size": -1},
        {"sliding_window": "4096"},
        {"sliding_window": float("inf")},
        {"max_position_embeddings": float("inf")},
        {"max_position_embeddings": float("nan")},
        {"max_position_embeddings": "8k"},
    ],
    ids=str,
)
def test_a_base_config_with_a_size_that_is_none_is_one_error(
    tmp_path: Path, model_type: str, wrong: dict[str, Any]
) -> None:
    recipe = write_recipe(tmp_path, tiny_llama(), adapter="longlora", sequence_len=4096)
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config |= {"model_type": model_type, "head_dim": 16, "use_sliding_window": True, **wrong}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    result = invoke(recipe)
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit), result.exception
    assert next(iter(wrong)) in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing argument 'RECIPE'"),
        (["nowhere.yml"], "cannot read recipe nowhere.yml"),
    ],
)
def test_a_command_line_that_cannot_work_is_an_error(arguments: list[str], message: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code != 0
    assert message in result.output


def test_an_unknown_gpu_or_base_is_a_clean_error(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_llama())
    result = invoke(recipe, "--gpu", "voodoo2")
    assert result.exit_code == 1
    assert "unknown GPU 'voodoo2'" in result.output
    recipe.write_text("base_model: ./not-here\n")
    result = invoke(recipe)
    assert result.exit_code == 1
    assert "base_model: the folder ./not-here does not exist" in result.output
    assert "Traceback" not in result.output

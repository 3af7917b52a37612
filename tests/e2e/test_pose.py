"""`attention_pattern: pose` in a run of Axolotl, in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from axolotl_runs import TARGET, train_in_process, write_recipe

from longlora_plugin.artifacts.manifest import read_manifest
from longlora_plugin.run.prepare import prepare_run
from longlora_plugin.run.recipe import read_recipe


@pytest.mark.e2e
def test_axolotl_trains_with_pose_and_ends_with_full_attention(
    tmp_path: Path, tiny_model_dir: Any, tiny_dataset: Path
) -> None:
    recipe = write_recipe(
        tmp_path,
        tiny_model_dir("pose"),
        tiny_dataset,
        adapter="longlora",
        max_steps=4,
        gradient_checkpointing=True,
        longlora={"attention_pattern": "pose", "full_attention_steps": 1},
    )
    train_in_process(recipe)
    manifest = read_manifest(tmp_path / "out")
    assert manifest.attention_pattern == "pose"
    assert (manifest.covered_layers, manifest.group_size) == (2, TARGET // 4)
    assert (manifest.steps, manifest.full_attention_steps) == (4, 1)
    assert (
        "attention inside groups whose positions skip" in (tmp_path / "out/README.md").read_text()
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rl", "dpo"),
        ("context_parallel_size", 2),
        ("sequence_parallel_degree", 2),
        ("context_parallel", {"size": 2}),
    ],
)
def test_what_cannot_have_positions_that_skip_is_refused(
    key: str, value: Any, tmp_path: Path, tiny_model_dir: Any, tiny_dataset: Path
) -> None:
    keys = {"longlora": {"attention_pattern": "pose"}, key: value}
    recipe = read_recipe(write_recipe(tmp_path, tiny_model_dir("pose"), tiny_dataset, **keys))
    written = f"{key}.size" if key == "context_parallel" else key
    found = prepare_run(recipe.raw, None).problems
    problems = [problem for problem in found if "attention_pattern: pose" in problem]
    assert len(problems) == 1
    assert problems[0].startswith(f"{written}: ")

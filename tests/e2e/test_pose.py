"""`attention_pattern: pose` through the real `axolotl train`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from axolotl_runs import TARGET, run_axolotl, write_recipe

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
    log = run_axolotl("train", recipe, "--launcher", "python").log
    assert f"shifted attention (pose): 2 layers, group size {TARGET // 4} of {TARGET} tokens" in log
    assert "step 3 of 4: training goes on with full attention" in log
    manifest = json.loads((tmp_path / "out" / "longlora.json").read_text())
    assert manifest["attention_pattern"] == "pose"


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

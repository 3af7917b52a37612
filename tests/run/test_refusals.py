"""Keys that would train or save something else are refused by name before anything loads."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from axolotl_runs import write_recipe
from transformers import LlamaConfig

from longlora_plugin.recipes.check import check_recipe
from longlora_plugin.run import refusals
from longlora_plugin.run.prepare import prepare_run

OUTSIDE: dict[str, dict[str, Any]] = {
    refusals.SHIFTED: {"longlora": {"shifted_attention": False}},
    refusals.ADAPTER: {"adapter": None, "longlora": {}},
    refusals.OURS: {"adapter": "lora", "longlora": {}},
    refusals.TRAINED: {"longlora": {"trainable": []}},
    refusals.NORMS: {"longlora": {"trainable": ["embeddings"]}},
    refusals.EMBEDDINGS: {"longlora": {"trainable": ["norms"]}},
}
"""Scope → what makes a recipe one that is not in it."""
PARALLEL = [
    {"tensor_parallel_size": 2},
    {"expert_parallel_size": "2"},
]


def problems(row: refusals.Refusal, value: Any, **changes: Any) -> list[str]:
    outer, _, inner = row.key.partition(".")
    given = {outer: {inner: value} if inner else value}
    recipe = {"base_model": "org/base", "adapter": "longlora", "sequence_len": 8192, **changes}
    found = prepare_run({**recipe, **given}, LlamaConfig(max_position_embeddings=4096)).problems
    return list(found)


@pytest.mark.parametrize("row", refusals.REFUSALS, ids=lambda row: f"{row.key}-{row.example}")
def test_a_refused_key_is_one_problem_that_names_it_its_reason_and_the_remedy(row):
    (problem,) = problems(row, row.example)
    assert problem.startswith(f"{row.key}: {str(row.example).lower()} ")
    assert row.why in problem
    assert problem.endswith(row.instead)
    for off in (None, False, 0, 1) if row.example == 2 else (None, False, 0):
        assert problems(row, off) == []
    if row.scope != refusals.ALWAYS:
        assert problems(row, row.example, **OUTSIDE[row.scope]) == []


@pytest.mark.parametrize("keys", PARALLEL, ids=lambda keys: next(iter(keys)))
def test_every_spelling_of_parallelism_is_refused_by_check_and_by_the_run(
    keys, tmp_path, tiny_model_dir, tiny_dataset
):
    from axolotl.cli.config import load_cfg

    path = write_recipe(tmp_path, tiny_model_dir("untied"), tiny_dataset, **keys)
    key = next(iter(keys))
    assert any(f"{key}" in problem for problem in check_recipe(path).problems)
    with pytest.raises(ValueError, match=rf"{key}.* does not work with"):
        load_cfg(str(path))
    # One of one is what Axolotl does without the key.
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), key: None}))
    load_cfg(str(path))

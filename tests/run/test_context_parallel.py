"""Rows that several GPUs share: what a recipe comes to, and what is refused, in all spellings."""

from __future__ import annotations

import importlib.metadata
import json
from typing import Any

import pytest
from transformers import LlamaConfig

from longlora_plugin.run import context_parallel
from longlora_plugin.run.needs import needs_of
from longlora_plugin.run.prepare import PreparedRun, prepare_run
from longlora_plugin.run.summary import launch_facts

SPELLINGS: dict[str, dict[str, Any]] = {
    "context_parallel_size": {"context_parallel_size": 4},
    "sequence_parallel_degree": {"sequence_parallel_degree": 4},
    "context_parallel.size": {"context_parallel": {"size": 4}},
}
OURS = {"group_size": 2048, "rope": "linear"}
spelled = pytest.mark.parametrize("key", SPELLINGS)


def prepared(
    monkeypatch: pytest.MonkeyPatch, version: str, keys: dict[str, Any], **base: Any
) -> PreparedRun:
    """What a recipe comes to under that version of Axolotl."""
    monkeypatch.undo()
    real = importlib.metadata.version
    monkeypatch.setattr(
        context_parallel.importlib.metadata,
        "version",
        lambda name: version if name == "axolotl" else real(name),
    )
    recipe = {"base_model": "org/base", "adapter": "longlora", "sequence_len": 32768}
    config = LlamaConfig(max_position_embeddings=4096, **base)
    return prepare_run({**recipe, "longlora": OURS, **keys}, config)


@spelled
@pytest.mark.parametrize("version", ["0.19.0", "0.20.0", "0.21.0"])
def test_shared_rows_are_planned_told_and_left_in_contiguous_parts(key, version, monkeypatch):
    run = prepared(monkeypatch, version, SPELLINGS[key])
    if version == "0.19.0" and key == "context_parallel.size":
        (problem,) = run.problems
        assert problem == (
            "context_parallel.size: 4: Axolotl 0.19.0 ignores it; write context_parallel_size: 4"
        )
        return
    assert run.problems == ()
    assert run.warnings == ()
    assert run.context_parallel == 4
    written = run.updates.get("context_parallel")
    assert written == (None if version == "0.19.0" else {"size": 4, "load_balance": "none"})
    assert any("4 GPUs share a row: 8192 tokens each" in str(fact) for fact in launch_facts(run))


@spelled
@pytest.mark.parametrize(
    ("version", "changes", "base", "says"),
    [
        ("0.19.0", {"deepspeed": "z.json"}, {}, ["deepspeed in Axolotl 0.19.0", "another row"]),
        ("0.20.0", {"deepspeed": "z.json"}, {}, ["deepspeed in Axolotl 0.20.0", "dropped"]),
        (
            "0.21.0",
            {"deepspeed": "z.json", "sample_packing": True},
            {},
            ["attn_implementation: sdpa", "across documents", "flash_attention_2", "fsdp"],
        ),
        ("0.19.0", {"cut_cross_entropy": True}, {}, ["cut_cross_entropy", "chunked_cross_"]),
        ("0.21.0", {"longlora": {**OURS, "rope": "dynamic"}}, {}, ["type dynamic", "yarn"]),
        (
            "0.21.0",
            {"longlora": {**OURS, "rope": "none"}},
            {
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    "factor": 8.0,
                    "short_factor": [1.0] * 64,
                    "long_factor": [1.0] * 64,
                    "original_max_position_embeddings": 4096,
                }
            },
            ["type longrope"],
        ),
        ("0.21.0", {"rl": "dpo"}, {}, ["rl: dpo", "whole rows"]),
        ("0.21.0", {"longlora": {**OURS, "held_out": "x"}}, {}, ["held_out", "val_set_size"]),
        ("0.21.0", {"tensor_parallel_size": 2}, {}, ["tensor_parallel_size: 2", "zero3"]),
        ("0.21.0", {"expert_parallel_size": 2}, {}, ["expert_parallel_size: 2", "zero3"]),
    ],
)
def test_what_does_not_work_with_shared_rows_is_refused_by_name(
    key, version, changes, base, says, monkeypatch
):
    run = prepared(monkeypatch, version, {**SPELLINGS[key], **changes}, **base)
    problems = [each for each in run.problems if "ignores it" not in each]
    (problem,) = problems
    assert key in problem or "parallel_size: 2" in problem
    for words in says:
        assert words in problem
    alone = prepared(monkeypatch, version, changes, **base)
    assert alone.problems == () or "_parallel_size" in says[0]


@spelled
def test_zigzag_is_refused_and_auto_is_written_as_none(key, monkeypatch):
    def of(**block: Any) -> PreparedRun:
        nested = {**SPELLINGS[key].get("context_parallel", {}), **block}
        return prepared(
            monkeypatch,
            "0.21.0",
            {**SPELLINGS[key], **({"context_parallel": nested} if block else {})},
        )

    (problem,) = of(load_balance="head_tail").problems
    assert "load_balance: head_tail" in problem
    assert "load_balance: none" in problem
    for given in ({}, {"load_balance": "auto"}):
        written = of(backend="ring", **given).updates["context_parallel"]
        assert written == {"size": 4, "backend": "ring", "load_balance": "none"}
    assert "context_parallel" not in of(load_balance="distflash").updates


@spelled
def test_deepspeed_in_0_21_trains_but_where_its_gradients_or_documents_are_wrong(
    key, monkeypatch, tmp_path
):
    def of(zero: dict[str, Any], **changes: Any) -> tuple[str, ...]:
        file = tmp_path / "zero.json"
        file.write_text(json.dumps({"zero_optimization": zero}))
        keys = {**SPELLINGS[key], "deepspeed": str(file), **changes}
        return prepared(monkeypatch, "0.21.0", keys).problems

    packed = {"sample_packing": True, "flash_attention": True}
    assert of({"stage": 2, "reduce_scatter": False}) == of({"stage": 3}, **packed) == ()
    (problem,) = of({"stage": 3, "reduce_scatter": False})
    assert problem.startswith(f'{key}: 4 does not work with "reduce_scatter": false under ZeRO-3')
    assert "remove that line" in problem


@spelled
def test_doctor_is_asked_for_an_exchange_and_the_package_that_cuts_rows(key, monkeypatch):
    prepared(monkeypatch, "0.21.0", {})
    needs = {need.name: need.key for need in needs_of(SPELLINGS[key])}
    assert needs["context_parallel"] == needs["ringmaster"] == f"{key}: 4"
    asked = {need.name for need in needs_of({**SPELLINGS[key], "deepspeed": "z.json"})}
    assert {"context_parallel", "deepspeed"} <= asked
    assert "ringmaster" not in asked
    prepared(monkeypatch, "0.19.0", {})
    assert "ring_flash_attn" in {need.name for need in needs_of(SPELLINGS[key])}


@spelled
def test_a_size_that_is_no_number_is_said(key, monkeypatch):
    outer, _, inner = key.partition(".")
    run = prepared(monkeypatch, "0.21.0", {outer: {inner: "eight"} if inner else "eight"})
    (problem,) = run.problems
    assert problem.startswith(f"{key}: got 'eight'")


@pytest.mark.parametrize(("group", "tokens", "processes"), [(12, 64, 4), (48, 64, 4), (20, 90, 3)])
def test_a_group_that_does_not_divide_a_shard_is_a_warning_with_both_figures(
    group, tokens, processes
):
    shard = tokens // processes
    halos = [
        sum((t + shift) // group == (first + shift) // group for t in range(first))
        for first in range(0, tokens, shard)
        for shift in (0, group // 2)
    ]
    best = max(size for size in range(2, group + 1, 2) if shard % size == 0)
    warning = context_parallel.group_warning(group, tokens, processes)
    assert warning is not None
    assert f"group size {group} does not divide the {shard} tokens of a GPU" in warning
    assert f"up to {max(halos)} tokens" in warning
    assert f"longlora: {{group_size: {best}}}, gets {best // 2}" in warning
    assert context_parallel.group_warning(best, tokens, processes) is None
    assert context_parallel.group_warning(group, tokens, 1) is None

"""A recipe's keys, and what they make of the plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from plan_material import plan_of, tiny_llama, write_recipe
from transformers import LlamaConfig

from longlora_plugin.plan.memory import Training
from longlora_plugin.plan.planner import planned_run
from longlora_plugin.run.recipe import read_recipe


def training_for(tmp_path: Path, gpus: int = 4, **keys: Any) -> tuple[Training, tuple[str, ...]]:
    run = planned_run(read_recipe(write_recipe(tmp_path, tiny_llama(), **keys)), tiny_llama(), gpus)
    return run.training, run.notes


def test_an_empty_recipe_means_axolotls_defaults(tmp_path: Path) -> None:
    training, notes = training_for(tmp_path, plugins=[])
    assert training == Training(
        sequence_len=512, gpus=4, checkpointing=False, optimizer="adamw", engine="ddp"
    )
    assert notes == ()


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"bf16": False}, {"compute_bytes": 4}),
        ({"bf16": False, "fp16": True}, {"compute_bytes": 2}),
        ({"adapter": "qlora", "load_in_4bit": True, "lora_target_linear": True},
         {"quantization": "nf4"}),
        ({"adapter": "longlora", "load_in_8bit": True}, {"quantization": "int8"}),
        ({"gradient_checkpointing": "offload"},
         {"checkpointing": True, "offload_activations": True}),
        ({"gradient_checkpointing": True, "activation_offloading": True},
         {"checkpointing": True, "offload_activations": True}),
        ({"optimizer": "paged_adamw_8bit"}, {"optimizer": "adamw_8bit"}),
        ({"optimizer": "adamw_torch"}, {"optimizer": "adamw", "optimizer_temporaries": 1}),
        ({"optimizer": "lion_8bit"}, {"optimizer": "lion_8bit"}),
        ({"optimizer": "adafactor"}, {"optimizer": "adafactor"}),
        ({"liger_fused_linear_cross_entropy": True}, {"loss": "fused"}),
        ({"chunked_cross_entropy": True}, {"loss": "chunked"}),
        ({"plugins": ["axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin"]},
         {"loss": "fused"}),
        ({"deepspeed": "deepspeed_configs/zero1.json"}, {"engine": "deepspeed", "zero_stage": 1}),
        ({"deepspeed": "deepspeed_configs/zero3_bf16.json"},
         {"zero_stage": 3, "bucket_elements": None, "offload_weights": False}),
        ({"deepspeed": "deepspeed_configs/zero3_bf16_cpuoffload_params.json"},
         {"zero_stage": 3, "offload_weights": True, "offload_optimizer": False}),
        ({"deepspeed": "zero3_bf16_cpuoffload_all.json"},
         {"zero_stage": 3, "offload_weights": True, "offload_optimizer": True}),
        ({"fsdp_version": 2, "fsdp_config": {"offload_params": False}},
         {"engine": "fsdp", "zero_stage": 3, "offload_weights": False}),
        ({"fsdp_version": 2, "fsdp_config": {"offload_params": True,
                                             "reshard_after_forward": False}},
         {"engine": "fsdp", "zero_stage": 2, "offload_weights": True}),
        ({"sample_packing": True}, {"dense_mask": True}),
        ({"sample_packing": True, "longlora": {"full_attention_steps": 0}},
         {"dense_mask": False, "shifted_copies": True}),
        ({"sample_packing": True, "longlora": {}}, {"dense_mask": True, "shifted_copies": True}),
        ({"sample_packing": True, "flash_attention": True}, {"dense_mask": False}),
    ],
)  # fmt: skip
def test_a_recipes_keys_reach_the_memory_model(
    tmp_path: Path, keys: dict[str, Any], expected: dict[str, Any]
) -> None:
    training, _ = training_for(tmp_path, **keys)
    assert {name: getattr(training, name) for name in expected} == expected


def test_a_deepspeed_file_is_read_where_it_exists(tmp_path: Path) -> None:
    zero = {"stage": 2, "offload_optimizer": {"device": "cpu"}, "reduce_bucket_size": 5e7}
    (tmp_path / "mine.json").write_text(json.dumps({"zero_optimization": zero}))
    training, notes = training_for(tmp_path, deepspeed="mine.json")
    assert (training.zero_stage, training.offload_optimizer) == (2, True)
    assert (training.bucket_elements, training.buckets) == (50_000_000, 1)
    assert notes == ()


def test_a_deepspeed_file_that_is_nowhere_is_noted_or_an_error(tmp_path: Path) -> None:
    _, notes = training_for(tmp_path, deepspeed="deepspeed_configs/zero2.json")
    assert "planned by its name as ZeRO-2 without offload" in notes[0]
    with pytest.raises(ValueError, match=r"deepspeed: mine\.json does not exist.*axolotl fetch"):
        training_for(tmp_path, deepspeed="mine.json")


def test_an_unknown_optimizer_and_parallelism_are_noted(tmp_path: Path) -> None:
    _, notes = training_for(tmp_path, optimizer="brand_new", tensor_parallel_size=2)
    assert "optimizer: brand_new is not known here" in notes[0]
    assert "tensor_parallel_size: 2 is not modelled" in notes[1]


def test_eager_attention_stores_the_scores_of_its_groups_only(tmp_path: Path) -> None:
    def run(**keys: Any) -> Any:
        path = write_recipe(tmp_path, tiny_llama(), attn_implementation="eager", **keys)
        return planned_run(read_recipe(path), tiny_llama())

    full, s2 = run(), run(longlora={"full_attention_steps": 0})
    last_steps = run(longlora={})
    layers = [plan.memory_at(8192).layer for plan in (full, s2, last_steps)]
    assert layers[0] == layers[2]
    assert 3.5 < layers[0] / layers[1] < 4.5


def test_the_last_full_attention_steps_lower_the_speed_up_of_the_run(tmp_path: Path) -> None:
    block = {"full_attention_steps": 0.25}
    keys = {"adapter": "longlora", "sequence_len": 65536, "longlora": block}
    plan = plan_of(read_recipe(write_recipe(tmp_path, LlamaConfig(), **keys)), LlamaConfig())
    assert plan.speedup_run == pytest.approx(1 / (0.25 + 0.75 / plan.speedup))
    assert 1 < plan.speedup_run < plan.speedup


def test_rows_below_full_attention_below_are_planned_with_full_attention(tmp_path: Path) -> None:
    block = {"full_attention_below": 8192}
    keys = {"sequence_len": 8192, "longlora": block}
    plan = plan_of(read_recipe(write_recipe(tmp_path, tiny_llama(), **keys)), tiny_llama())
    assert plan.group_size is None
    assert plan.speedup == 1

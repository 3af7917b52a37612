"""Two processes that share every row, through the real `axolotl train`, against one process.

What cuts the rows depends on Axolotl: 0.19 has ring-flash-attn, which runs here on a FlashAttention
by definition (`flash_shim.py`); 0.21 has ringmaster.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import trainer_runs
from packaging.version import Version
from trainer_runs import Run

from longlora_plugin.run.context_parallel import splits_with_ring_flash_attn

AXOLOTL = Version(importlib.metadata.version("axolotl"))
RING = splits_with_ring_flash_attn()
NEEDS = "ring_flash_attn" if RING else "ringmaster"
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(
        importlib.util.find_spec(NEEDS) is None,
        reason=f"Axolotl cuts rows with {NEEDS}, which is not installed here (make install does)",
    ),
]
deepspeed = pytest.mark.skipif(
    Version("0.21.dev0") > AXOLOTL, reason="refused: before Axolotl 0.21 processes lose rows"
)
TOLERANCE = 2e-3
CLOSE = 1e-3
PLUGINS = ["longlora_plugin.LongLoRAPlugin", "cpu_shim.CpuShim", "kill_switch.KillSwitch"]
HALF_MASKED = {
    "field_instruction": "question",
    "field_output": "answer",
    "format": "{instruction} ",
    "no_input_format": "{instruction} ",
}
ROWS = {
    # Rows of several lengths, the first part of each without targets.
    "prompts": {
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "val_set_size": 4,
        "eval_steps": 3,
        "train_on_inputs": False,
    },
    "packed": {
        "micro_batch_size": 1,
        "sample_packing": True,
        "pad_to_sequence_len": True,
        "curriculum_sampling": True,  # in order: packs are drawn apart by runs of several processes
        "gradient_checkpointing": True,
    },
}
FSDP2 = {
    "fsdp_version": 2,
    "fsdp_config": {
        "fsdp_version": 2,
        "state_dict_type": "SHARDED_STATE_DICT",
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
        "cpu_ram_efficient_loading": False,
        "reshard_after_forward": True,
    },
}


# What rows of a million tokens need to be held in memory.
LIGER = {
    "liger_fused_linear_cross_entropy": True,
    "plugins": ["liger_shim.LigerShim", "axolotl.integrations.liger.LigerPlugin"],
}
TILED = {**LIGER, "tiled_mlp": True, "tiled_mlp_num_shards": 3}
OFFLOADED = {**LIGER, "activation_offloading": "hidden_states"}


@pytest.fixture(scope="module")
def material(tmp_path_factory, tiny_text) -> Path:
    """A folder with rows of both kinds."""
    folder = tmp_path_factory.mktemp("rows")
    words = tiny_text.split()
    asked = [
        {
            "question": " ".join(words[i : i + 35 + i % 9]),
            "answer": " ".join(words[i + 50 : i + 70 + i % 7]),
        }
        for i in range(0, 2400, 40)
    ]
    texts = [{"text": " ".join(words[i : i + 20 + i % 31])} for i in range(0, 3000, 30)]
    for name, rows in (("prompts", asked), ("packed", texts)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines)
    return folder


@pytest.fixture(scope="module")
def train(tmp_path_factory, material, tiny_model_dir):
    """Function (kind of rows, processes, **recipe) → the run."""

    def run(rows: str, processes: int, *, env: Any = None, **changes: Any) -> Run:
        data = material / f"{rows}.jsonl"
        kind = HALF_MASKED if rows == "prompts" else "completion"
        keys: dict[str, Any] = {
            "datasets": [{"path": str(data), "ds_type": "json", "type": kind}],
            "dataset_prepared_path": str(material / f"prepared-{rows}"),
            "bf16": False,
            "adam_epsilon": 1.0e-3,
            "longlora": {"rope": "linear", "group_size": 16, "full_attention_steps": 2},
            **ROWS[rows],
            **changes,
        }
        folder = keys.pop("folder", None) or tmp_path_factory.mktemp(rows)
        if processes > 1:
            keys = {"context_parallel_size": processes, **keys}
            if RING:
                keys["attn_implementation"] = "flash_attention_2"
        keys["plugins"] = [*PLUGINS, *keys.pop("plugins", [])]
        if keys.get("attn_implementation") == "flash_attention_2":
            keys["plugins"].append("flash_shim.FlashShim")
        recipe = trainer_runs.write_recipe(folder, tiny_model_dir("untied"), data, keys)
        return trainer_runs.train(recipe, processes=processes, env=env)

    return run


@pytest.fixture(scope="module")
def one_process(train):
    """Function (kind of rows) → an uninterrupted run in one process."""
    done: dict[str, Run] = {}

    def run(rows: str) -> Run:
        if rows not in done:
            done[rows] = train(rows, 1).ok()
        return done[rows]

    return run


def check(shared: Run, alone: Run) -> None:
    """The same losses, and the same tensors in the adapter that the first process saved."""
    ours, theirs = shared.losses("checkpoint-6"), alone.losses("checkpoint-6")
    print({step: (ours[step], theirs[step]) for step in theirs})
    assert set(ours) == set(theirs) == set(range(1, 7))
    assert theirs[1] - theirs[6] > 50 * TOLERANCE, "the curve is too flat to compare"
    assert max(abs(ours[step] - theirs[step]) for step in ours) <= TOLERANCE
    assert "step 4 of 6: training goes on with full attention" in shared.log
    saved, wanted = shared.adapter, alone.adapter
    assert set(saved) == set(wanted)
    assert any("embed_tokens" in name for name in saved)
    assert sum("norm" in name for name in saved) == 5
    for name, tensor in wanted.items():
        assert saved[name].shape == tensor.shape, name
        assert float((saved[name] - tensor).abs().max()) <= CLOSE, name


def evaluated(run: Run) -> dict[int, float]:
    state = json.loads((run.output_dir / "checkpoint-6/trainer_state.json").read_text())
    return {row["step"]: row["eval_loss"] for row in state["log_history"] if "eval_loss" in row}


def test_shared_rows_with_masked_prompts_killed_and_resumed_equal_one_process(
    train, one_process, tmp_path
):
    alone = one_process("prompts")
    killed = train("prompts", 2, folder=tmp_path, env={"LONGLORA_TEST_KILL_AFTER": "4"})
    assert "killed after step 4" in killed.log, killed.log[-6000:]
    assert len(re.findall("LongLoRA: context parallel over 2 processes", killed.log)) == 1
    resumed = train("prompts", 2, folder=tmp_path, auto_resume_from_checkpoints=True).ok()
    assert len(resumed.printed_losses) == 3, "it did not go on from step 3"
    check(resumed, alone)
    assert evaluated(resumed) == pytest.approx(evaluated(alone), abs=TOLERANCE)


def zero(stage: int, folder: Path) -> str:
    """A DeepSpeed file in fp32."""
    automatic = ("gradient_accumulation_steps", "gradient_clipping", "train_batch_size")
    settings = {
        "zero_optimization": {"stage": stage, "reduce_bucket_size": "auto"},
        **dict.fromkeys([*automatic, "train_micro_batch_size_per_gpu"], "auto"),
    }
    file = folder / f"zero{stage}.json"
    file.write_text(json.dumps(settings))
    return str(file)


@deepspeed
def test_shared_rows_under_zero2_killed_and_resumed_equal_one_process(train, material, tmp_path):
    # DeepSpeed counts the rows of a step alike; on a CPU it gathers rows of one length only, and
    # cuts several into parts that are no tensors of their own.
    keys = {"micro_batch_size": 1, "gradient_accumulation_steps": 1, "pad_to_sequence_len": True}
    # Two rows to train on and four to evaluate: the run is resumed in the middle of epoch 2 of 3.
    data = {"path": str(material / "prompts.jsonl"), "ds_type": "json", "split": "train[:6]"}
    keys["datasets"] = [{**data, "type": HALF_MASKED}]
    alone = train("prompts", 1, **keys).ok()
    keys |= {"deepspeed": zero(2, tmp_path), "folder": tmp_path}
    killed = train("prompts", 2, env={"LONGLORA_TEST_KILL_AFTER": "4"}, **keys)
    assert "killed after step 4" in killed.log, killed.log[-6000:]
    resumed = train("prompts", 2, auto_resume_from_checkpoints=True, **keys).ok()
    assert len(resumed.printed_losses) == 3, "it did not go on from step 3"
    check(resumed, alone)
    assert evaluated(resumed) == pytest.approx(evaluated(alone), abs=TOLERANCE)


@deepspeed
def test_packed_rows_under_zero3_with_tiled_ffns_equal_one_process(train, one_process, tmp_path):
    keys = {"attn_implementation": "flash_attention_2", "deepspeed": zero(3, tmp_path)}
    shared = train("packed", 2, **keys, **TILED).ok()
    assert list(shared.output_dir.glob("checkpoint-6/global_step6/*zero_pp_rank_1*"))
    check(shared, one_process("packed"))


def test_packed_rows_under_fsdp2_as_in_the_recipe_for_a_million_equal_one_process(
    train, one_process
):
    shared = train("packed", 2, **FSDP2, **OFFLOADED).ok()
    assert (shared.output_dir / "checkpoint-6/pytorch_model_fsdp_0/__1_0.distcp").exists()
    (told,) = re.findall("context parallel over 2 processes: .*", shared.log)
    assert told.startswith("context parallel over 2 processes: 64 tokens each, up to ")
    assert told.endswith("ring attention: 16.4 KB)")  # K and V of 64 tokens, 2 heads of 16 numbers
    check(shared, one_process("packed"))

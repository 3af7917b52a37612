"""`plan`'s hours and money, what makes a run fit, and what context parallelism sends."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import plan_material
import pytest
from plan_material import LLAMA_SAVED, invoke, tiny_llama
from transformers import LlamaConfig, Qwen3Config

from longlora_plugin.plan.cost import Rate, Steps, cost_of
from longlora_plugin.plan.gpus import GPUS
from longlora_plugin.plan.memory import GIB, Training, host_memory, memory, saved_by_layer
from longlora_plugin.plan.parameters import Parameters, count_parameters
from longlora_plugin.plan.planner import planned_run
from longlora_plugin.plan.remedies import remedies
from longlora_plugin.plan.shape import ModelShape, meta_model, shape_of
from longlora_plugin.run.recipe import read_recipe

small_llama = partial(tiny_llama, num_hidden_layers=6)
write_recipe = partial(plan_material.write_recipe, adapter="longlora")


@pytest.fixture(scope="module")
def qwen3_8b() -> tuple[ModelShape, Parameters]:
    """Qwen3-8B and what `adapter: longlora` trains of it."""
    config = Qwen3Config(
        hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, vocab_size=151936,
    )  # fmt: skip
    model = meta_model(config)
    counts = count_parameters(
        model,
        lora_r=8,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        saved_modules=LLAMA_SAVED,
    )
    return shape_of(model), counts


# --- hours and money -------------------------------------------------------------------------


def test_hours_are_the_flops_over_the_assumed_rate() -> None:
    cost = cost_of(
        Steps(100, "max_steps", 64), Rate(8, 312, 0.5, 2.0), {"s2": 1500.0, "full": 3000.0},
        sequence_len=32768, full_share=0.1,
    )  # fmt: skip
    seconds = 64 * 1500 / (8 * 312 * 0.5)
    assert cost.seconds_per_step == pytest.approx({"s2": seconds, "full": 2 * seconds})
    assert cost.hours["run"] == pytest.approx(100 * seconds * (0.1 * 2 + 0.9) / 3600)
    assert cost.hours["full"] == pytest.approx(100 * 2 * seconds / 3600)
    assert cost.gpu_hours["run"] == pytest.approx(8 * cost.hours["run"])
    assert cost.price == pytest.approx({k: 16 * hours for k, hours in cost.hours.items()})
    assert cost.tokens_per_step == 64 * 32768


@pytest.mark.parametrize(
    "option",
    [("--flops-share", value) for value in (0, 1.01, "nan")]
    + [("--price-per-gpu-hour", value) for value in (-1, "nan", "inf")],
)
def test_a_share_or_a_price_that_cannot_be_is_an_error(
    tmp_path: Path, option: tuple[str, object]
) -> None:
    result = invoke(write_recipe(tmp_path, tiny_llama()), *option)
    assert result.exit_code == 2
    assert f"Invalid value for '{option[0]}'" in result.output


@pytest.mark.parametrize("gpu", [[], ["--gpu", "48gb"]])
def test_a_price_without_a_speed_is_told_to_have_no_effect(tmp_path: Path, gpu: list[str]) -> None:
    path = write_recipe(tmp_path, small_llama())
    result = invoke(path, "--price-per-gpu-hour", 2, "--rows", 10, *gpu)
    assert "--rows, --price-per-gpu-hour: hours and money are planned for a GPU" in result.output


@pytest.mark.parametrize(
    ("shifted", "length", "hours"),
    [
        (False, 8192, 6.0), (False, 16384, 14.0), (False, 32768, 36.5), (False, 65536, 92.5),
        (True, 8192, 5.2), (True, 16384, 11.3), (True, 32768, 24.6), (True, 65536, 52.4),
    ],
)  # fmt: skip
def test_planned_hours_of_the_papers_runs_follow_table_12(
    tmp_path: Path, shifted: bool, length: int, hours: float
) -> None:
    recipe = write_recipe(
        tmp_path, LlamaConfig(), sequence_len=length, max_steps=1000, gradient_checkpointing=True,
        gradient_accumulation_steps=8, attn_implementation="flash_attention_2",
        longlora={"shifted_attention": shifted, "full_attention_steps": 0},
    )  # fmt: skip
    result = invoke(
        recipe, "--gpu", "a100-80gb", "--gpus", 8, "--price-per-gpu-hour", 2,
        "--json", tmp_path / "plan.json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    cost = json.loads((tmp_path / "plan.json").read_text())["cost"]
    # Full attention reaches more of the peak the longer the row: 0.48 of it at 8k, 0.59 at 64k.
    assert cost["hours"]["run"] == pytest.approx(hours, rel=0.15 if shifted else 0.32)
    assert cost["price"]["run"] == pytest.approx(16 * cost["hours"]["run"])
    assert cost["rows_per_step"] == 64
    assert "45% of 312 TFLOP/s assumed" in result.output.replace("\n", " ")


@pytest.mark.parametrize(
    ("keys", "rows", "steps", "why"),
    [
        ({"max_steps": 300}, None, 300, "max_steps"),
        ({"num_epochs": 2}, 800, 100, "2 epochs of 800 rows"),
        ({}, None, 1000, "1000 steps: max_steps is not set"),
    ],
)
def test_a_run_has_the_steps_its_recipe_says(
    tmp_path: Path, keys: dict[str, Any], rows: int | None, steps: int, why: str
) -> None:
    path = write_recipe(
        tmp_path, small_llama(), sequence_len=4096, gradient_accumulation_steps=4, **keys
    )
    run = planned_run(read_recipe(path), small_llama(), gpus=4, rows=rows)
    assert (run.steps.count, run.steps.rows) == (steps, 16)
    assert why in run.steps.why


# --- what saves memory -----------------------------------------------------------------------


def test_chunked_cross_entropy_takes_qwen3_8b_at_128k_from_356_to_205_gib(
    qwen3_8b: tuple[ModelShape, Parameters],
) -> None:
    shape, counts = qwen3_8b
    run = Training(131072, gpus=8)
    alone, together = remedies(
        run, lambda changed: memory(shape, counts, changed), 80 * GIB, adapter=True
    )
    needed = {tried.write[0]: tried.needed for tried in alone}
    chunked = needed["chunked_cross_entropy: true"]
    before = memory(shape, counts, run).needed / GIB
    # The logits: 12 bytes each, or 5.5 in eight chunks.
    assert before - chunked == pytest.approx(131072 * 151936 * 6.5 / GIB)
    totals = [
        memory(shape, counts, replace(run, loss=loss)).total / GIB for loss in ("full", "chunked")
    ]
    assert [round(total) for total in totals] == [356, 205]
    assert [each.write[0] for each in alone if each.fits] == ["context_parallel_size: 8"]
    assert together is not None  # what costs neither GPUs nor precision
    assert together.fits
    assert not any("context_parallel" in line or "4bit" in line for line in together.write)


def test_what_makes_a_run_fit_is_no_more_than_it_takes(
    qwen3_8b: tuple[ModelShape, Parameters],
) -> None:
    shape, counts = qwen3_8b
    run = Training(65536, micro_batch_size=2, checkpointing=False)
    available = 80 * GIB
    alone, together = remedies(
        run, lambda changed: memory(shape, counts, changed), available, adapter=True
    )
    assert not any(tried.fits for tried in alone)
    assert together is not None
    assert together.fits
    assert len(together.write) == len(set(together.write))
    kinds = [line.split(":")[0] for line in together.write]
    assert "chunked_cross_entropy" not in kinds or "liger_fused_linear_cross_entropy" not in kinds


def test_a_remedy_that_is_in_use_is_not_offered_again() -> None:
    shape = shape_of(meta_model(small_llama()))
    counts = count_parameters(meta_model(small_llama()), lora_r=8, target_modules=["q_proj"])
    run = Training(
        4096, loss="fused", offload_activations=True, quantization="nf4", offload_layers=True
    )
    alone, together = remedies(run, lambda t: memory(shape, counts, t), 1.0, adapter=True)
    assert alone == []
    assert together is None


def test_tiled_mlp_keeps_of_an_ffn_its_input_and_one_tile() -> None:
    shape = shape_of(meta_model(small_llama()))
    whole, tiled = (saved_by_layer(shape, adapter=True, mlp_tiles=tiles) for tiles in (1, 4))
    assert whole - tiled == 2 * (3 * 172 - 3 * 172 / 4 - 64)


def test_layer_offloading_leaves_three_layers_of_frozen_weights_on_the_gpu() -> None:
    model = meta_model(small_llama())
    shape = shape_of(model)
    counts = count_parameters(model, lora_r=8, target_modules=["q_proj"])
    kept, offloaded = (
        memory(shape, counts, Training(512, offload_layers=on)).weights for on in (False, True)
    )
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    assert kept - offloaded == pytest.approx(2 * 3 * layer)
    assert host_memory(shape, counts, Training(512, offload_layers=True)) == pytest.approx(
        2 * 3 * layer
    )


def test_a_lora_runs_offloading_moves_all_activations_to_the_cpu_unless_inputs_are_asked_for(
    tmp_path: Path,
) -> None:
    """Axolotl's `activation_offloading: true` replaces recomputation where there is an adapter."""

    def run(value: Any, **keys: Any) -> Any:
        path = write_recipe(
            tmp_path, small_llama(), sequence_len=4096, gradient_checkpointing=True,
            activation_offloading=value, **keys,
        )  # fmt: skip
        return planned_run(read_recipe(path), small_llama())

    everything, inputs, full = run(True), run("hidden_states"), run(True, adapter=None, longlora={})
    assert not everything.training.checkpointing
    assert inputs.training.checkpointing
    assert full.training.checkpointing
    held = [host_memory(r.shape, r.parameters, r.training) for r in (everything, inputs, full)]
    assert held[1] == held[2] == 6 * 2 * 64 * 4096
    assert held[0] > 5 * held[1]
    assert everything.memory_at(4096).activations == inputs.memory_at(4096).activations == 0
    step = [r.step_at(4096, None)["ffn"] for r in (everything, inputs)]
    assert step[1] == 1.5 * step[0]  # forward, recomputation and backward for forward and backward


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"layer_offloading": True}, {"offload_layers": True}),
        ({"tiled_mlp": True, "sequence_len": 100_000}, {"mlp_tiles": 4}),
        ({"tiled_mlp": True, "tiled_mlp_num_shards": 3}, {"mlp_tiles": 3}),
        ({"chunked_cross_entropy": True, "chunked_cross_entropy_num_chunks": 16},
         {"loss": "chunked", "loss_chunks": 16}),
        ({"context_parallel_size": 2}, {"context_parallel": 2}),
        ({"sequence_parallel_degree": 4}, {"context_parallel": 4}),
        ({"sample_packing": True, "attn_implementation": "sdpa"}, {"dense_mask": False}),
        ({"sample_packing": True, "attn_implementation": "sdpa", "sdpa_varlen": False},
         {"dense_mask": True}),
        ({"sample_packing": True, "attn_implementation": "sdpa", "bf16": False},
         {"dense_mask": True}),
        ({"sample_packing": True}, {"dense_mask": True}),
    ],
)  # fmt: skip
def test_axolotls_keys_for_memory_reach_the_model(
    tmp_path: Path, keys: dict[str, Any], expected: dict[str, Any]
) -> None:
    block = {"shifted_attention": False}
    path = write_recipe(tmp_path, small_llama(), longlora=block, **keys)
    training = planned_run(read_recipe(path), small_llama(), gpus=4).training
    assert {name: getattr(training, name) for name in expected} == expected


def test_wide_heads_and_sliding_layers_keep_the_dense_mask_of_packed_rows(tmp_path: Path) -> None:
    from transformers import MistralConfig

    keys = {"sample_packing": True, "attn_implementation": "sdpa", "longlora": {"rope": "none"}}
    for config in (
        small_llama(head_dim=320),
        MistralConfig(
            vocab_size=100, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, sliding_window=64,
        ),
    ):  # fmt: skip
        path = write_recipe(tmp_path, config, **{**keys, "adapter": None})
        recipe = read_recipe(path)
        recipe.raw.pop("longlora")
        recipe = type(recipe)(recipe.path, recipe.raw, None)
        assert planned_run(recipe, config).training.dense_mask


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"load_in_4bit": "yes please"}, "load_in_4bit: got 'yes please'; write load_in_4bit: "),
        ({"sequence_len": "32k"}, "sequence_len: got '32k'; write a whole number, such as "
                                  "sequence_len: 32768"),
        ({"sequence_len": -5}, "sequence_len: got -5"),
        ({"sequence_len": 0}, "sequence_len: got 0; write a whole number, such as "),
        ({"micro_batch_size": "two"}, "micro_batch_size: got 'two'; write a whole number, such as "
                                      "micro_batch_size: 1"),
        ({"num_epochs": "two"}, "num_epochs: got 'two'; write a number above 0"),
        ({"num_epochs": -1}, "num_epochs: got -1; write a number above 0"),
        ({"tensor_parallel_size": "x"}, "tensor_parallel_size: got 'x'; write a whole number"),
        ({"attn_implementation": "flash"}, "write attn_implementation: flash_attention_2"),
        ({"s2_attention": True}, "s2_attention: Axolotl removed it; remove the line"),
        ({"adapter": "LongLoRA"}, "adapter: got 'LongLoRA'; write adapter: longlora"),
        ({"plugins": ["longlora_plugin.LongLoraPlugin"]}, "write longlora_plugin.LongLoRAPlugin"),
        ({"plugins": "longlora_plugin.LongLoRAPlugin"}, "plugins: got "),
        ({"micro_batch_size": 0.5}, "micro_batch_size: got 0.5"),
        ({"gradient_chekpointing": True}, "gradient_chekpointing is not a key of Axolotl"),
        ({"plugins": []}, "plugins: longlora_plugin.LongLoRAPlugin is not among them"),
        ({"longlora": {"group_sise": 8}}, "group_sise"),
    ],
)  # fmt: skip
def test_what_check_refuses_is_not_planned(
    tmp_path: Path, keys: dict[str, Any], message: str
) -> None:
    result = invoke(write_recipe(tmp_path, small_llama(), **keys))
    assert result.exit_code == 1
    assert message in result.output.replace("\n", " ")
    assert "Traceback" not in result.output


@pytest.mark.parametrize("length", ["4096", 4096.0, 4096])
def test_a_number_that_axolotl_takes_is_planned(tmp_path: Path, length: Any) -> None:
    path = write_recipe(tmp_path, small_llama(), sequence_len=length, micro_batch_size="2")
    result = invoke(path, "--json", "-")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["sequence_len"] == 4096


def test_a_recipe_of_an_axolotl_plugin_is_planned(tmp_path: Path) -> None:
    plugins = ["longlora_plugin.LongLoRAPlugin", "axolotl.integrations.liger.LigerPlugin"]
    path = write_recipe(
        tmp_path, small_llama(), plugins=plugins, liger_fused_linear_cross_entropy=True
    )
    result = invoke(path, "--gpu", "a100-80gb")
    assert result.exit_code == 0, result.output


def test_what_does_not_fit_comes_with_what_makes_it_fit(tmp_path: Path) -> None:
    path = write_recipe(
        tmp_path, LlamaConfig(), sequence_len=65536, attn_implementation="flash_attention_2"
    )
    result = invoke(path, "--gpu", "a100-80gb", "--json", tmp_path / "plan.json")
    assert result.exit_code == 0, result.output
    assert "does not fit 1 × a100-80gb" in result.output
    written = json.loads((tmp_path / "plan.json").read_text())
    alone = {tried["write"][0]: tried for tried in written["remedies"]}
    assert not written["fits"]
    best = written["together"] or next(t for t in written["remedies"] if t["fits"])
    assert best["needed"] <= GPUS["a100-80gb"].memory
    assert "gradient_checkpointing: true" in alone
    assert "Changes, each alone" in result.output


def test_importing_what_plan_needs_for_arithmetic_loads_no_torch() -> None:
    import subprocess
    import sys

    code = (
        "import sys, longlora_plugin.plan, longlora_plugin.recipes.screen; "
        "print([m for m in ('torch', 'transformers', 'peft', 'axolotl') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("model_config", "tflop"), [({"sliding_window": None}, 5067), ({}, 613)], ids=["none", "4096"]
)
def test_attention_of_mistral_is_planned_with_the_window_that_the_recipe_gives_it(
    tmp_path: Path, model_config: dict[str, Any], tflop: int
) -> None:
    from transformers import MistralConfig

    config = MistralConfig(max_position_embeddings=32768, sliding_window=4096)
    keys = {"gradient_checkpointing": True, "attn_implementation": "flash_attention_2"}
    block = {"rope": "yarn", "original_context": 8192, "shifted_attention": bool(model_config)}
    path = write_recipe(
        tmp_path, config, sequence_len=65536, longlora=block, model_config=model_config, **keys
    )
    run = planned_run(read_recipe(path), config)
    assert run.step_at(65536, None)["attention"] == pytest.approx(tflop, abs=0.6)
    # Dense causal attention by hand: 2 products forward, again, and 5 of 2 backward.
    pairs = 65536 * 65537 / 2
    if model_config:
        assert run.step_at(65536, None)["attention"] == pytest.approx(
            4.5 * 2 * 2 * pairs * 4096 * 32 / 1e12
        )

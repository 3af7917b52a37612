"""`adapter: longlora` on 4-bit and 8-bit bases: what is quantized, what trains, and how exactly."""

from __future__ import annotations

import json

import pytest
import trainer_runs

pytestmark = pytest.mark.e2e

LAYERS = 2
LINEARS_PER_LAYER = 7
EVALUATE = {"val_set_size": 0.1, "eval_steps": 3, "max_steps": 8, "save_steps": 8}


@pytest.fixture(scope="module")
def probed(tmp_path_factory, tiny_model_dir, tiny_dataset):
    """Function (name, **recipe) → the run and what the probe saw in it; each name runs once."""
    seen: dict[str, tuple[trainer_runs.Run, dict]] = {}

    def run(name: str, **changes: object):
        if name not in seen:
            folder = tmp_path_factory.mktemp(name)
            recipe = trainer_runs.write_recipe(
                folder, tiny_model_dir("untied"), tiny_dataset, {**EVALUATE, **changes}
            )
            probe = folder / "probe.json"
            done = trainer_runs.train(recipe, env={"LONGLORA_TEST_PROBE": str(probe)}).ok()
            seen[name] = (done, json.loads(probe.read_text()))
        return seen[name]

    return run


@pytest.fixture(params=["nf4", "int8"])
def base(request, probed):
    changes = {
        "nf4": {"load_in_4bit": True, "bf16": False, "fp16": False},
        "int8": {"load_in_8bit": True},
    }[request.param]
    return (request.param, *probed(request.param, **changes))


def test_every_linear_layer_but_the_head_is_quantized(base):
    name, _, seen = base
    assert len(seen["quantized"]) == LAYERS * LINEARS_PER_LAYER
    assert not any("lm_head" in module for module in seen["quantized"])
    if name == "nf4":
        assert seen["kinds"] == ["Linear4bit"]
        assert seen["nested"] == [True], "double quantization is off"
    else:
        assert seen["kinds"] == ["Linear8bitLt"]


def test_embeddings_and_norms_are_not_quantized_and_train_in_fp32(base):
    _, run, seen = base
    full = {name: dtype for name, dtype in seen["trained"].items() if "modules_to_save" in name}
    assert len(full) == 1 + 2 * LAYERS + 1
    assert set(seen["trained"].values()) == {"torch.float32"}
    saved = run.adapter
    first = trainer_runs.adapter(run.output_dir / "checkpoint-8")
    assert set(saved) == set(first)
    for name, tensor in saved.items():
        if "norm" in name:
            assert (tensor != 1).any(), f"{name} did not train"
        if "lora_B" in name:
            assert tensor.any(), f"{name} did not train"


def test_activations_stay_in_the_compute_dtype(base):
    name, _, seen = base
    assert seen["activations"] == ["torch.float32" if name == "nf4" else "torch.bfloat16"]


def test_the_loss_falls(base):
    _, run, _ = base
    losses = run.losses("checkpoint-8")
    assert losses[8] < losses[1] - 0.2, losses


def test_nf4_gradients_equal_the_dequantized_models_also_after_an_evaluation(probed):
    _, seen = probed("nf4", load_in_4bit=True, bf16=False, fp16=False)
    for when in ("gradient_error", "gradient_error_after_evaluation"):
        assert max(seen[when].values()) < 1e-3, (when, seen[when])


def test_int8_gradients_are_those_of_the_dequantized_model_up_to_int8_activations(probed):
    _, seen = probed("int8", load_in_8bit=True)
    for when in ("gradient_error", "gradient_error_after_evaluation"):
        assert sum(seen[when].values()) / len(seen[when]) < 0.1, (when, seen[when])


def test_a_4bit_base_trains_in_bf16_too(probed):
    run, seen = probed("nf4-bf16", load_in_4bit=True)
    assert seen["activations"] == ["torch.bfloat16"]
    assert set(seen["trained"].values()) == {"torch.float32"}
    losses = run.losses("checkpoint-8")
    assert losses[8] < losses[1] - 0.2, losses


def test_embedding_lr_is_the_rate_of_embeddings_and_norms(probed):
    _, seen = probed(
        "embedding-lr",
        embedding_lr=1.0e-5,
        max_steps=1,
        save_steps=1,
        val_set_size=0,
        eval_steps="",
    )
    for name, rate in seen["learning_rates"].items():
        assert rate == (1.0e-5 if "modules_to_save" in name else 5.0e-3), name


def test_loraplus_trains_norms_at_the_fast_rate_and_the_log_says_so(probed):
    run, seen = probed(
        "loraplus", loraplus_lr_ratio=16, max_steps=1, save_steps=1, val_set_size=0, eval_steps=""
    )
    assert "loraplus_lr_ratio counts norms to its fast group" in run.log
    for name, rate in seen["learning_rates"].items():
        fast = "norm" in name or "lora_B" in name
        assert rate == pytest.approx(16 * 5.0e-3 if fast else 5.0e-3), name


def test_8bit_optimizer_trains_every_tensor(probed):
    run, seen = probed(
        "adam-8bit",
        optimizer="adamw_bnb_8bit",
        max_steps=2,
        save_steps=2,
        val_set_size=0,
        eval_steps="",
    )
    assert seen["optimizer_bits"] == 8
    assert all(tensor.any() for name, tensor in run.adapter.items() if "lora_B" in name)
    assert all((tensor != 1).any() for name, tensor in run.adapter.items() if "norm" in name)

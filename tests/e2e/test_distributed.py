"""Two processes under DeepSpeed ZeRO-1, 2, 3, 3 with offload, FSDP2 and DDP, against one process.

Each launcher is killed with `kill -9` after step 4 of 6 and resumed from its checkpoint at step 3;
its loss curve and its saved tensors are compared with an uninterrupted one-process run that has the
same rows in each step.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import trainer_runs
from trainer_runs import Run

from longlora_plugin.adapter import state, zero3

pytestmark = pytest.mark.e2e

DEEPSPEED = Path(__file__).parents[2] / "examples/configs/deepspeed"
KILL = {"LONGLORA_TEST_KILL_AFTER": "4"}
FSDP2 = {
    "fsdp_version": 2,
    "fsdp_config": {
        "fsdp_version": 2,
        # Resuming from this kind of checkpoint is silently wrong; the package writes the other.
        "state_dict_type": "FULL_STATE_DICT",
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
        "cpu_ram_efficient_loading": False,
        "reshard_after_forward": True,
    },
}
STEADY = {"adam_epsilon": 1.0e-3}
"""Adam's updates follow the gradient: its usual ε gives each element a whole step by its sign, and
rounding turns the sign of the small ones."""
LAUNCHERS = {
    # name: recipe, tied embeddings, tolerance of a step's loss, files that show two processes
    "zero1": ({}, False, 2e-3, "checkpoint-6/global_step6/*zero_pp_rank_1*optim_states.pt"),
    "zero2": ({}, False, 2e-3, "checkpoint-6/global_step6/*zero_pp_rank_1*optim_states.pt"),
    "zero3": ({}, True, 1e-2, "checkpoint-6/global_step6/*zero_pp_rank_1*optim_states.pt"),
    "zero3_offload": ({}, False, 2e-3, "checkpoint-6/global_step6/*zero_pp_rank_1*optim_states.pt"),
    "zero3-nf4": (
        {"load_in_4bit": True, "deepspeed": str(DEEPSPEED / "zero3.json")},
        False,
        2e-3,
        "checkpoint-6/global_step6/*zero_pp_rank_1*optim_states.pt",
    ),
    # FSDP2's mixed precision rounds the loss itself to bf16, whose step is 1/32 between 4 and 8.
    "fsdp2": (FSDP2, True, 1 / 32, "checkpoint-6/pytorch_model_fsdp_0/__1_0.distcp"),
    "fsdp2-checkpointing": (
        {**FSDP2, "fsdp_config": {**FSDP2["fsdp_config"], "activation_checkpointing": True}},
        True,
        1 / 32,
        "checkpoint-6/pytorch_model_fsdp_0/__1_0.distcp",
    ),
    "ddp": ({}, False, 2e-3, "checkpoint-6/rng_state_1.pth"),
}


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, tiny_model_dir, tiny_dataset):
    """Function (tied, **recipe) → an uninterrupted run in one process."""
    done: dict[str, Run] = {}

    def run(tied: bool, **changes: object) -> Run:
        key = repr((tied, changes))
        if key not in done:
            model = tiny_model_dir("tied" if tied else "untied", tie_word_embeddings=tied)
            recipe = trainer_runs.write_recipe(
                tmp_path_factory.mktemp("one"),
                model,
                tiny_dataset,
                {"micro_batch_size": 4, **STEADY, **changes},
            )
            done[key] = trainer_runs.train(recipe).ok()
        return done[key]

    return run


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_killed_and_resumed_in_two_processes_equals_one_process(
    launcher, tmp_path, one_process, tiny_model_dir, tiny_dataset
):
    changes, tied, tolerance, second_process = LAUNCHERS[launcher]
    model = tiny_model_dir("tied" if tied else "untied", tie_word_embeddings=tied)
    reference = one_process(
        tied, **{key: changes[key] for key in ("load_in_4bit",) if key in changes}
    )
    config = DEEPSPEED / f"{launcher}.json"
    changes = {**STEADY, **changes}
    if config.is_file():
        changes = {**changes, "deepspeed": str(config)}
    recipe = trainer_runs.write_recipe(tmp_path, model, tiny_dataset, changes)

    if launcher == "zero3":  # as a user does; each process imports Axolotl anew
        killed = trainer_runs.launch(recipe, deepspeed=config, env=KILL)
    else:
        killed = trainer_runs.train(recipe, processes=2, env=KILL)
    assert any(killed.codes)
    assert "killed after step 4" in killed.log, killed.log[-6000:]
    assert not (killed.output_dir / "adapter_model.safetensors").exists()

    trainer_runs.write_recipe(
        tmp_path, model, tiny_dataset, {**changes, "auto_resume_from_checkpoints": True}
    )
    resumed = trainer_runs.train(recipe, processes=2).ok()
    assert len(resumed.printed_losses) == 3, "it did not go on from step 3"
    assert list(resumed.output_dir.glob(second_process)), "only one process trained"
    assert "step 4 of 6: training goes on with full attention" in resumed.log

    ours, theirs = resumed.losses("checkpoint-6"), reference.losses("checkpoint-6")
    assert set(ours) == set(theirs) == set(range(1, 7))
    assert theirs[1] - theirs[6] > 20 * tolerance, "the curve is too flat to compare"
    assert max(abs(ours[step] - theirs[step]) for step in ours) <= tolerance, (ours, theirs)
    if not launcher.startswith("fsdp2"):  # its four printed digits are the rounded loss
        assert killed.printed_losses[3] == pytest.approx(resumed.printed_losses[0], abs=1e-3)

    check_tensors(resumed.adapter, reference.adapter, model)
    check_tensors(
        trainer_runs.adapter(resumed.output_dir / "checkpoint-6"), reference.adapter, model
    )


def check_tensors(saved: dict, reference: dict, model: Path) -> None:
    """Every tensor there, whole, in fp32 (not rounded to bf16), changed, and changed alike."""
    from safetensors.torch import load_file

    base = load_file(model / "model.safetensors")
    assert set(saved) == set(reference)
    assert sum("norm" in name for name in saved) == 5
    assert any("embed_tokens" in name for name in saved)
    for name, tensor in saved.items():
        assert tensor.shape == reference[name].shape, name
        assert tensor.dtype == torch.float32, name
        assert (tensor.bfloat16().float() != tensor).any(), f"{name} is rounded to bf16"
        plain = name.removeprefix("base_model.model.")
        if "lora_A" in name:
            continue
        before = base.get(plain, base["model.embed_tokens.weight"]) if "lora" not in name else 0
        ours, theirs = tensor - before, reference[name] - before
        assert ours.any(), f"{name} did not change"
        assert float((ours - theirs).norm() / theirs.norm()) < 0.25, name


@pytest.mark.parametrize("launcher", ["one process", "zero2", "zero3", "fsdp2"])
def test_continuing_from_an_adapter_starts_with_its_exact_fp32_values(
    launcher, tmp_path, one_process, tiny_model_dir, tiny_dataset
):
    start = one_process(False)
    config = DEEPSPEED / f"{launcher}.json"
    changes = {"deepspeed": str(config)} if config.is_file() else {}
    recipe = trainer_runs.write_recipe(
        tmp_path,
        tiny_model_dir("untied"),
        tiny_dataset,
        {
            **(FSDP2 if launcher == "fsdp2" else changes),
            "lora_model_dir": str(start.output_dir),
            "learning_rate": 1.0e-30,  # Axolotl refuses 0; no fp32 value moves by this
            "max_steps": 1,
            "save_steps": 1,
        },
    )
    run = trainer_runs.train(recipe, processes=1 if launcher == "one process" else 2).ok()
    after = run.adapter
    assert set(after) == set(start.adapter)
    for name, tensor in start.adapter.items():
        assert torch.equal(after[name], tensor), name


def test_zero3_settings_that_would_load_the_base_in_fp32_are_refused(tmp_path, tiny_model_dir):
    import json

    from transformers import AutoConfig

    from longlora_plugin.run.prepare import prepare_run

    settings = json.loads((DEEPSPEED / "zero3.json").read_text())
    settings["bf16"]["enabled"] = "auto"
    (tmp_path / "auto.json").write_text(json.dumps(settings))
    model = tiny_model_dir("untied")
    recipe = {"base_model": str(model), "adapter": "longlora", "sequence_len": 128, "bf16": True}
    config = AutoConfig.from_pretrained(model)
    assert not prepare_run({**recipe, "deepspeed": str(DEEPSPEED / "zero3.json")}, config).problems
    (problem,) = prepare_run({**recipe, "deepspeed": str(tmp_path / "auto.json")}, config).problems
    assert 'Write "enabled": true' in problem


def small_peft_model(**lora: object):
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
    )
    config = LoraConfig(
        target_modules=["q_proj"], modules_to_save=["embed_tokens", "input_layernorm"], **lora
    )
    return get_peft_model(base, config)


@pytest.mark.parametrize("lora", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_gathered_names_and_values_are_those_that_peft_saves(lora):
    from peft import get_peft_model_state_dict

    model = small_peft_model(**lora)
    theirs = get_peft_model_state_dict(model)
    ours = state.gather_adapter_state(model)
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_putting_gathered_tensors_back_restores_every_value():
    model = small_peft_model()
    before = state.gather_adapter_state(model)
    with torch.no_grad():
        for parameter in (each for each in model.parameters() if each.requires_grad):
            parameter.add_(1)
    state.load_adapter_state(model, before)
    assert all(
        torch.equal(now, before[name]) for name, now in state.gather_adapter_state(model).items()
    )


def test_an_adapter_that_lacks_or_misfits_tensors_is_refused_and_nothing_is_set():
    model = small_peft_model()
    good = {name: tensor + 1 for name, tensor in state.gather_adapter_state(model).items()}
    embedding = next(name for name in good if "embed_tokens" in name)
    without = {name: tensor for name, tensor in good.items() if name != embedding}
    with pytest.raises(ValueError, match="lacks 1 of the 4 tensors"):
        state.load_adapter_state(model, without)
    with pytest.raises(ValueError, match=r"another base model.*\(31, 16\), the model's \(32, 16\)"):
        state.load_adapter_state(model, {**good, embedding: good[embedding][:31]})
    assert not any(
        torch.equal(now, good[name]) for name, now in state.gather_adapter_state(model).items()
    )


def test_wrappers_of_checkpointing_fsdp_and_compile_are_not_in_names():
    name = "_orig_mod.base_model.model.layers.0._checkpoint_wrapped_module.q.lora_A.default.weight"
    assert state.name_in_file(name) == "base_model.model.layers.0.q.lora_A.weight"


def test_wrappers_answer_for_deepspeeds_marks_themselves_only_while_installed():
    from peft.utils.other import AuxiliaryTrainingWrapper

    stock = AuxiliaryTrainingWrapper.__getattr__
    wrapper = small_peft_model().base_model.model.model.layers[0].input_layernorm
    child = wrapper.modules_to_save["default"]
    child.post_bwd_fn, child.colour = "the child's", "red"
    assert wrapper.post_bwd_fn == "the child's"  # what misleads DeepSpeed

    marks = zero3.ZeRO3HookGuard().install()
    again = zero3.ZeRO3HookGuard().install()
    assert not hasattr(wrapper, "post_bwd_fn")
    assert wrapper.colour == "red"
    assert wrapper.weight is child.weight
    wrapper.post_bwd_fn = "its own"
    assert wrapper.post_bwd_fn == "its own"

    again.remove()
    assert not hasattr(small_peft_model().base_model.model.model.norm, "post_bwd_fn")
    marks.remove()
    assert AuxiliaryTrainingWrapper.__getattr__ is stock

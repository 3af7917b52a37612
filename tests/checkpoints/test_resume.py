"""`kill -9` and resume in one process, and checkpoints that were not written to the end."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import trainer_runs
from trainer_runs import Run

from longlora_plugin.checkpoints.files import checkpoints
from longlora_plugin.checkpoints.resume import choose_checkpoint, why_not_resumable
from longlora_plugin.run.prepare import prepare_run

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, tiny_model_dir, tiny_dataset) -> Run:
    recipe = trainer_runs.write_recipe(
        tmp_path_factory.mktemp("whole"), tiny_model_dir("untied"), tiny_dataset, {}
    )
    return trainer_runs.train(recipe).ok()


@pytest.fixture(scope="module")
def killed_and_resumed(tmp_path_factory, tiny_model_dir, tiny_dataset) -> tuple[Run, Run]:
    """Killed after step 5; beside its checkpoint at step 3 lies a half-written one of step 5."""
    folder = tmp_path_factory.mktemp("killed")
    recipe = trainer_runs.write_recipe(
        folder, tiny_model_dir("untied"), tiny_dataset, {"auto_resume_from_checkpoints": True}
    )
    killed = trainer_runs.train(recipe, env={"LONGLORA_TEST_KILL_AFTER": "5"})
    half = killed.output_dir / "checkpoint-5"
    shutil.copytree(killed.output_dir / "checkpoint-3", half)
    (half / "trainer_state.json").unlink()
    (half / "optimizer.pt").unlink()
    return killed, trainer_runs.train(recipe).ok()


def test_a_resumed_run_ends_with_bitwise_the_adapter_of_an_uninterrupted_one(
    uninterrupted, killed_and_resumed
):
    killed, resumed = killed_and_resumed
    assert killed.codes == [-9]
    assert len(killed.printed_losses) == 5
    assert len(resumed.printed_losses) == 3
    assert set(resumed.adapter) == set(uninterrupted.adapter)
    for name, tensor in uninterrupted.adapter.items():
        assert torch.equal(resumed.adapter[name], tensor), name
    assert resumed.losses("checkpoint-6") == uninterrupted.losses("checkpoint-6")


def test_a_resumed_run_switches_to_full_attention_at_the_same_step(
    uninterrupted, killed_and_resumed
):
    line = "step 4 of 6: training goes on with full attention"
    for run in (uninterrupted, *killed_and_resumed):
        assert run.log.count("training goes on with") == 1
        assert line in run.log


def test_a_half_written_checkpoint_is_passed_over_with_a_warning(killed_and_resumed):
    _, resumed = killed_and_resumed
    assert "checkpoint-5 is passed over: it has no trainer_state.json" in resumed.log
    assert "checkpoint-3" in resumed.log


def test_checkpoints_hold_fp32_masters(uninterrupted):
    saved = trainer_runs.adapter(uninterrupted.output_dir / "checkpoint-3")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    norms = [tensor for name, tensor in saved.items() if "norm" in name]
    assert all((tensor.bfloat16().float() != tensor).any() for tensor in norms)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE = {
    "no trainer_state.json": lambda f: (f / "trainer_state.json").unlink(),
    "trainer_state.json is cut off": lambda f: _cut(f / "trainer_state.json"),
    "adapter_model.safetensors is cut off": lambda f: _cut(f / "adapter_model.safetensors"),
    "no adapter_model.safetensors": lambda f: (f / "adapter_model.safetensors").unlink(),
    "optimizer.pt is cut off": lambda f: _cut(f / "optimizer.pt"),
    "no optimizer state": lambda f: (f / "optimizer.pt").unlink(),
    "rng_state.pth is cut off": lambda f: _cut(f / "rng_state.pth"),
}


@pytest.fixture
def run_folder(uninterrupted, tmp_path) -> Path:
    for step in (3, 6):
        name = f"checkpoint-{step}"
        shutil.copytree(uninterrupted.output_dir / name, tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("problem", DAMAGE)
def test_a_damaged_checkpoint_is_never_resumed(problem, run_folder):
    newest = run_folder / "checkpoint-6"
    assert why_not_resumable(newest) is None
    DAMAGE[problem](newest)

    updates, warnings = choose_checkpoint(run_folder, newest=True)
    assert updates == {"resume_from_checkpoint": str(run_folder / "checkpoint-3")}
    assert len(warnings) == 1
    assert problem in warnings[0]

    with pytest.raises(
        ValueError, match=r"cannot be resumed.*last complete.*checkpoint-3"
    ) as error:
        choose_checkpoint(run_folder, named=str(newest))
    assert problem in str(error.value)


def test_without_a_complete_checkpoint_training_starts_anew_and_says_so(run_folder):
    for folder in checkpoints(run_folder):
        (folder / "trainer_state.json").unlink()
    updates, warnings = choose_checkpoint(run_folder, newest=True)
    assert updates == {"auto_resume_from_checkpoints": False}
    assert len(warnings) == 3
    assert "starts at step 0" in warnings[-1]


def test_a_weights_only_checkpoint_needs_no_optimizer_state(run_folder):
    (run_folder / "checkpoint-6" / "optimizer.pt").unlink()
    updates, warnings = choose_checkpoint(run_folder, newest=True, weights_only=True)
    assert updates == {"resume_from_checkpoint": str(run_folder / "checkpoint-6")}
    assert not warnings


def test_an_fsdp_checkpoint_of_the_kind_that_loses_shards_is_refused(run_folder):
    folder = run_folder / "checkpoint-6"
    torch.save({}, folder / "pytorch_model_fsdp.bin")
    assert "FULL_STATE_DICT" in str(why_not_resumable(folder))
    assert why_not_resumable(folder, adapter=False) is None


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda f: (f / "adapter_config.json").unlink(), "it has no adapter_config.json"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), "it has no adapter_model"),
        (lambda f: _cut(f / "adapter_model.safetensors"), "is cut off or damaged"),
        (shutil.rmtree, "there is no such folder"),
    ],
)
def test_a_recipe_that_continues_from_a_damaged_adapter_is_refused(
    damage, problem, run_folder, tiny_model_dir
):
    from transformers import AutoConfig

    model = tiny_model_dir("untied")
    recipe = {
        "base_model": str(model),
        "adapter": "longlora",
        "sequence_len": 128,
        "lora_model_dir": str(run_folder / "checkpoint-6"),
    }
    prepare_run(recipe, AutoConfig.from_pretrained(model)).checked()
    damage(run_folder / "checkpoint-6")
    with pytest.raises(ValueError, match=r"lora_model_dir: .* holds no adapter") as error:
        prepare_run(recipe, AutoConfig.from_pretrained(model)).checked()
    assert problem in str(error.value)


def test_continuing_from_an_adapter_without_embeddings_and_norms_is_refused(
    tmp_path, tiny_model_dir, tiny_dataset
):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = tiny_model_dir("untied")
    plain = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model), LoraConfig(target_modules=["q_proj"])
    )
    plain.save_pretrained(tmp_path / "plain")
    recipe = trainer_runs.write_recipe(
        tmp_path, model, tiny_dataset, {"lora_model_dir": str(tmp_path / "plain")}
    )
    run = trainer_runs.train(recipe)
    assert run.codes == [1]
    assert "asks for 6 modules that would not train" in run.log
    assert "was made without them" in run.log


def test_added_tokens_and_the_recipes_own_modules_to_save_are_trained_beside_ours(
    tmp_path, tiny_model_dir, tiny_dataset
):
    from transformers import AutoTokenizer

    recipe = trainer_runs.write_recipe(
        tmp_path,
        tiny_model_dir("untied"),
        tiny_dataset,
        {
            "tokens": ["<one>", "<two>"],
            "lora_modules_to_save": ["embed_tokens", "lm_head"],
            "max_steps": 2,
            "save_steps": 2,
        },
    )
    saved = trainer_runs.train(recipe).ok().adapter
    tokens = len(AutoTokenizer.from_pretrained(tiny_model_dir("untied")))
    rows = {name: t for name, t in saved.items() if name.endswith((".lm_head.weight", "ns.weight"))}
    assert len(rows) == 2
    for name, tensor in rows.items():
        assert tensor.shape == (tokens + 2, 64), name
        assert tensor.dtype == torch.float32
    assert sum("norm" in name for name in saved) == 5

"""Figures of `held_out` text reach the loggers, and a run ends with where it stands."""

from __future__ import annotations

from importlib.util import find_spec
from types import SimpleNamespace

import pytest
from axolotl_runs import run_axolotl, write_recipe

pytestmark = pytest.mark.e2e

NAMES = {
    "long_context/base_perplexity_at_original",
    "long_context/perplexity",
    "long_context/perplexity_192-256",
}


@pytest.fixture(scope="module")
def logged(tmp_path_factory, tiny_model_dir, tiny_dataset, tiny_text):
    """A run of 3 steps that measures at the second and the end, with every logger."""
    folder = tmp_path_factory.mktemp("logged")
    (folder / "held_out.txt").write_text(tiny_text)
    mlflow = {
        "use_mlflow": True,
        "mlflow_tracking_uri": (folder / "mlruns").as_uri(),
        "mlflow_experiment_name": "long",
    }
    recipe = write_recipe(
        folder,
        tiny_model_dir("untied"),
        tiny_dataset,
        max_steps=3,
        use_tensorboard=True,
        use_wandb=True,
        wandb_mode="offline",
        wandb_project="long",
        longlora={
            "held_out": str(folder / "held_out.txt"),
            "held_out_steps": 2,
            "full_attention_steps": 1,
        },
        **(mlflow if find_spec("mlflow") else {}),
    )
    run = run_axolotl(
        "train", recipe, "--launcher", "python", WANDB_DIR=folder, MLFLOW_ALLOW_FILE_STORE="true"
    )
    return SimpleNamespace(folder=folder, recipe=recipe, out=folder / "out", log=run.log)


def test_a_run_ends_with_what_it_made_and_what_comes_next(logged):
    block = logged.log[logged.log.index("LongLoRA: the run is finished") :]
    for line in (
        "and 6 modules (embeddings, norms; ",
        f"saved in  {logged.out}",
        "context   64 → 256 tokens, RoPE yarn",
        "steps     2 with shifted attention (groups of 64), then 1 with full attention",
        f"next      longlora eval {logged.recipe}\n",
        f"axolotl merge-lora {logged.recipe}\n",
        f"longlora serve-check {logged.out}/merged",
    ):
        assert line in block, block[:2000]


def test_tensorboard_gets_the_figures_of_every_measurement_in_one_file(logged):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = logged.folder.rglob("events.out.tfevents.*")
    found = EventAccumulator(str(events)).Reload()
    names = {f"train/{name}" for name in NAMES}
    assert names <= set(found.Tags()["scalars"])
    assert [each.step for each in found.Scalars("train/long_context/perplexity")] == [2, 3]


def test_wandb_offline_gets_the_figures(logged):
    (path,) = logged.folder.rglob("*.wandb")
    written = path.read_bytes()  # protocol buffers: names are plain text in them
    assert all(f"train/{name}".encode() in written for name in NAMES)


@pytest.mark.skipif(find_spec("mlflow") is None, reason="mlflow is not installed")
def test_mlflow_gets_the_figures_in_one_run(logged):
    files = [
        path for path in logged.folder.glob("mlruns/*/*/metrics/long_context/*") if path.is_file()
    ]
    assert {f"long_context/{path.name}" for path in files} >= NAMES
    assert len({path.parents[2] for path in files}) == 1

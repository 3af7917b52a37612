"""Every key of the installed Axolotl is in the table, and what the table says of it is so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import trainer_runs
import yaml
from outcome_probe import TOKENS
from transformers import AutoModelForCausalLM, LlamaConfig

from longlora_plugin import load_model
from longlora_plugin.run.prepare import prepare_run
from longlora_plugin.run.refusals import REFUSALS

ROOT = Path(__file__).parents[2]
TABLE: dict[str, Any] = yaml.safe_load((ROOT / "docs/works_with.yml").read_text("utf-8"))
RUNS: dict[str, dict[str, Any]] = TABLE["runs"]
BEST = "the best checkpoint, not the last"


def keys_of_the_table() -> set[str]:
    """All that are not refused."""
    listed = [TABLE["base"], TABLE["tests"], TABLE["refused values"], TABLE["old keys"]]
    listed += [TABLE["preference training"], *TABLE["no bearing"].values()]
    listed += [*TABLE["not run here"].values(), *RUNS.values()]
    return {key for keys in listed for key in keys if not key.startswith("_")} - {"longlora"}


def test_every_key_of_axolotls_schema_has_a_row():
    from axolotl.utils.schemas.config import AxolotlConfigWCapabilities

    refused = {row.key.split(".")[0] for row in REFUSALS}
    without = set(AxolotlConfigWCapabilities.model_fields) - keys_of_the_table() - refused
    assert not without, f"not in docs/works_with.yml nor refused: {sorted(without)}"


def test_tests_that_the_table_names_exist_and_name_the_key_or_what_it_does():
    for key, path in TABLE["tests"].items():
        assert (ROOT / path).is_file(), key


@pytest.mark.parametrize("key", TABLE["refused values"])
def test_a_value_that_the_table_calls_refused_is_refused_by_name(key):
    recipe = {"base_model": "org/base", "adapter": "longlora", "sequence_len": 8192, key: True}
    (problem,) = prepare_run(recipe, LlamaConfig(max_position_embeddings=4096)).problems
    assert TABLE["refused values"][key] in problem


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_model_dir, tiny_dataset):
    """Function (name of a run) → the run."""
    folder = tmp_path_factory.mktemp("works-with")

    def train(name: str) -> trainer_runs.Run:
        keys = dict(RUNS[name])
        rows = keys.pop("_rows", None)
        keys.pop("_within", None)
        base = tiny_model_dir(f"rows-{rows}", vocab_size=rows) if rows else tiny_model_dir("untied")
        text = json.dumps(keys).replace('"_data"', json.dumps(str(tiny_dataset)))
        plugins = ["longlora_plugin.LongLoRAPlugin", "cpu_shim.CpuShim"]
        path = trainer_runs.write_recipe(
            folder / name.replace(" ", "-").replace(",", ""),
            base,
            tiny_dataset,
            {
                "plugins": [*plugins, "outcome_probe.OutcomeProbe"],
                "longlora": {"full_attention_steps": 1},
                "bf16": False,
                "max_steps": 3,
                "save_steps": 10,
                **json.loads(text),
            },
        )
        return trainer_runs.train(path).ok()

    return train


@pytest.mark.e2e
@pytest.mark.parametrize("name", RUNS)
def test_what_is_saved_is_what_was_trained_with_these_keys(trained, name):
    run = trained(name)
    outcome = torch.load(run.output_dir / "outcome.pt")
    assert outcome["trained"] > 0
    # LoRA's A moves from the second step on, when B is no longer zero.
    still = "lora_A" if name == BEST else "none"
    assert all(still in tensor for tensor in outcome["unchanged"])
    if RUNS[name].get("adapter") == "":
        model = AutoModelForCausalLM.from_pretrained(run.output_dir)
    else:
        model = load_model(str(run.output_dir))
    with torch.no_grad():
        logits = model.float().eval()(input_ids=TOKENS).logits
    torch.testing.assert_close(
        logits, outcome["logits"], atol=RUNS[name].get("_within", 1e-5), rtol=1e-4
    )
    if name == BEST:
        state = json.loads((run.output_dir / "checkpoint-2/trainer_state.json").read_text())
        assert Path(state["best_model_checkpoint"]).name == "checkpoint-1"
        best = trainer_runs.adapter(run.output_dir / "checkpoint-1")
        assert best.keys() == run.adapter.keys()
        assert all(torch.equal(best[key], run.adapter[key]) for key in best)

"""Preference training by the real Axolotl: the first loss is that of an unchanged policy.

A reference, or GRPO's old policy, is the policy itself before the first step, so DPO's first loss
is ln 2 and every ratio is 1, unless the two were computed with different attention or RoPE.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import trainer_runs

pytestmark = pytest.mark.e2e

LAYERS = 2
FULL_FINE_TUNE = {"adapter": ""}
LORA = {"adapter": "lora", "lora_r": 8, "lora_alpha": 16, "lora_target_modules": ["q_proj"]}
TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def rows(tmp_path_factory, tiny_text: str) -> dict[str, Path]:
    """Datasets of 12 rows of about 100 tokens, as each method wants them."""
    folder = tmp_path_factory.mktemp("preferences")
    words = tiny_text.split()
    made: dict[str, list[dict[str, Any]]] = {"pairs": [], "kto": [], "orpo": [], "reward": []}
    for i in range(12):
        question, good, bad = (" ".join(words[100 * i + k : 100 * i + k + 30]) for k in (0, 30, 60))
        made["pairs"].append({"prompt": question, "chosen": good, "rejected": bad})
        made["kto"].append({"prompt": question, "completion": good, "label": i % 2 == 0})
        turns = {
            name: [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            for name, answer in (("chosen", good), ("rejected", bad))
        }
        made["orpo"].append(turns)
        made["reward"].append(
            {"input": question, "chosen": good, "rejected": bad, "system": "Answer."}
        )
    paths = {name: folder / f"{name}.jsonl" for name in made}
    for name, path in paths.items():
        path.write_text("".join(json.dumps(row) + "\n" for row in made[name]))
    return paths


METHODS: dict[str, dict[str, Any]] = {
    "dpo": {"type": "passthrough.default"},
    "ipo": {"type": "passthrough.default"},
    "simpo": {"type": "passthrough.default"},
    "kto": {"type": {"field_prompt": "prompt"}},
    "orpo": {"type": "chat_template.argilla", "chat_template": "tokenizer_default"},
    "grpo": {"type": "preference_probe.prompts"},
    "reward": {"type": "bradley_terry.chat_template"},
}
ROWS = {"kto": "kto", "orpo": "orpo", "reward": "reward"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_model_dir, rows):
    """Function (method, **changes) → the run, and what the probe saw in it."""

    def run(method: str, **changes: Any) -> tuple[trainer_runs.Run, dict[str, Any]]:
        folder = tmp_path_factory.mktemp(method)
        path = rows[ROWS.get(method, "pairs")]
        dataset = {"path": str(path), "ds_type": "json", "split": "train", **METHODS[method]}
        keys = {
            "plugins": [
                "longlora_plugin.LongLoRAPlugin",
                "cpu_shim.CpuShim",
                "preference_probe.PreferenceProbe",
            ],
            "datasets": [dataset],
            "dataset_prepared_path": str(folder / "prepared"),
            "max_steps": 2,
            "save_steps": 2,
            "bf16": False,
            "longlora": {"full_attention_steps": 0},
            "micro_batch_size": 2,
            "chat_template": "jinja",
            "chat_template_jinja": TEMPLATE,
            **({"reward_model": True} if method == "reward" else {"rl": method}),
            **changes,
        }
        if method == "reward":
            keys.update(model_type="AutoModelForSequenceClassification", num_labels=1)
        if method == "kto":
            keys["remove_unused_columns"] = False
        recipe = trainer_runs.write_recipe(folder, tiny_model_dir("untied"), path, keys)
        probe = folder / "probe.json"
        done = trainer_runs.train(recipe, env={"LONGLORA_TEST_PROBE": str(probe)}).ok()
        return done, json.loads(probe.read_text())

    return run


def first_loss(run: trainer_runs.Run) -> float:
    return run.losses("checkpoint-2")[1]


def full_copies(run: trainer_runs.Run) -> list[str]:
    return [name for name in run.adapter if ".lora_" not in name]


@pytest.mark.parametrize("base", [{}, {"load_in_4bit": True, "fp16": False}], ids=["fp32", "nf4"])
def test_dpo_trains_embeddings_and_norms_from_a_loss_of_ln_2(base, trained):
    run, seen = trained("dpo", **base, longlora={"full_attention_steps": 1})
    assert first_loss(run) == pytest.approx(math.log(2), abs=1e-5)
    # The policy's and the reference's pass, and no backward pass that computes attention again.
    assert seen["steps"] == [[2 * LAYERS, 0], [2 * LAYERS, 0]], "S² ran in the full step"
    assert "training goes on with full attention" in run.log
    assert len(full_copies(run)) == 1 + 2 * LAYERS + 1
    assert set(seen["trained"].values()) == {"torch.float32"}
    manifest = json.loads((run.output_dir / "longlora.json").read_text())
    assert manifest["trained_modules"] == 1 + 2 * LAYERS + 1
    assert manifest["full_attention_steps"] == 1


def test_a_precomputed_reference_has_the_attention_of_the_steps_and_not_another_runs(
    trained, tmp_path
):
    keys = {**LORA, "precompute_ref_log_probs": True, "dataset_prepared_path": str(tmp_path)}
    # TRL keeps what this one computes beside the rows that both read.
    off, _ = trained("dpo", **keys, longlora={"shifted_attention": False})
    run, seen = trained("dpo", **keys, longlora={"full_attention_steps": 1})
    assert first_loss(off) == pytest.approx(math.log(2), abs=1e-5)
    assert first_loss(run) == pytest.approx(math.log(2), abs=1e-5)
    assert seen["before"][0] > 0, "the reference was taken from the cache"
    assert seen["steps"][1][0] - seen["steps"][0][0] == LAYERS, "the last step is sparse as well"
    assert "full_attention_steps: 1 becomes 0" in run.log


@pytest.mark.parametrize(
    ("method", "full_steps", "loss"), [("dpo", 2, math.log(2)), ("ipo", 1, (1 / (2 * 0.1)) ** 2)]
)
def test_a_reference_model_of_its_own_follows_the_policy(method, full_steps, loss, trained):
    block = {"full_attention_steps": full_steps}
    run, seen = trained(method, **FULL_FINE_TUNE, longlora=block)
    assert first_loss(run) == pytest.approx(loss, rel=1e-4)
    sparse = 2 - full_steps
    assert seen["steps"] == [[LAYERS * min(step, sparse)] * 2 for step in (1, 2)]


@pytest.mark.parametrize("adapter", [{}, FULL_FINE_TUNE], ids=["longlora", "full fine-tune"])
def test_ktos_first_loss_is_that_of_an_unchanged_policy(adapter, trained):
    run, seen = trained("kto", **adapter)
    # 1 - sigmoid(0) for every row, wanted or not.
    assert first_loss(run) == pytest.approx(0.5, abs=1e-5)
    assert seen["steps"][0][0] > 0


@pytest.mark.parametrize("adapter", [{}, FULL_FINE_TUNE], ids=["longlora", "full fine-tune"])
def test_grpo_rolls_out_with_full_attention_and_starts_with_ratios_of_1(adapter, trained):
    grpo = {
        "num_generations": 2,
        "max_completion_length": 24,
        "use_vllm": False,
        "beta": 0.04,
        "num_iterations": 2,
        "reward_funcs": ["preference_probe.share_of_a"],
    }
    _, seen = trained("grpo", **adapter, trl=grpo)
    assert seen["generating"], "nothing was generated"
    assert all(before == after for before, after in seen["generating"])
    assert seen["steps"][0][0] > 0
    assert set(seen["ratios"][0]) == {"old_per_token_logps", "ref_per_token_logps"}
    assert all(away < 1e-5 for away in seen["ratios"][0].values())


@pytest.mark.parametrize("method", ["orpo", "simpo", "reward"])
def test_methods_without_a_reference_train_embeddings_and_norms(method, trained):
    run, seen = trained(method, **({"simpo_gamma": 0.5} if method == "simpo" else {}))
    assert math.isfinite(first_loss(run))
    assert seen["steps"][0][0] >= LAYERS
    assert len([name for name in full_copies(run) if "score" not in name]) == 1 + 2 * LAYERS + 1


@pytest.mark.parametrize(
    ("keys", "refusal"),
    [
        ({"relora": True, "jagged_restart_steps": 2}, "relora: true does not work"),
        ({"rl": "dpo", "lora_model_dir": "checkpoint-9"}, "Axolotl does not read it there"),
        ({"rl": "ebft"}, "rl: ebft does not work with shifted attention"),
    ],
)
def test_what_cannot_be_sound_is_refused_before_anything_loads(
    keys, refusal, tmp_path, tiny_model_dir, tiny_dataset
):
    recipe = trainer_runs.write_recipe(tmp_path, tiny_model_dir("untied"), tiny_dataset, keys)
    done = trainer_runs.train(recipe)
    assert done.codes == [1]
    assert refusal in done.log
    assert "Loading model" not in done.log

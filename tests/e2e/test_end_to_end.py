"""The main job through the real `axolotl` command: train, merge, load without the plugin."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
import trainer_runs
import yaml
from axolotl_runs import CONTEXT, TARGET, merge_lora, run_axolotl, train_in_process, write_recipe
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_model_dir, tiny_dataset, tiny_text):
    """A bf16 run at the paper's learning rate on a base with tied embeddings."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "held_out.txt").write_text(tiny_text)
    base = tiny_model_dir("tied", tie_word_embeddings=True)
    recipe = write_recipe(
        folder,
        base,
        tiny_dataset,
        plugins=["longlora_plugin.LongLoRAPlugin", "cpu_shim.CpuShim"],
        bf16=True,
        longlora={
            "rope": "yarn",
            "full_attention_steps": 0.25,
            "held_out": str(folder / "held_out.txt"),
            "held_out_steps": 4,
        },
    )
    run = run_axolotl("train", recipe, "--launcher", "python")
    return SimpleNamespace(folder=folder, base=base, recipe=recipe, out=folder / "out", log=run.log)


def test_run_logs_what_was_done(trained):
    assert "{'rope_theta': 10000.0, 'rope_type': 'default'} → " in trained.log
    assert "context 64 → 256" in trained.log
    assert "LongLoRA trained in addition to LoRA: embeddings, norms: 7 modules" in trained.log
    assert "kept in float32, computing in bfloat16" in trained.log
    assert "shifted attention (s2): 2 layers, group size 64 of 256 tokens" in trained.log
    assert "step 6 of 8: training goes on with full attention" in trained.log
    assert trained.log.count("long_context/perplexity'") == 2  # after 4 and 8 steps


def test_norms_and_embeddings_moved_in_bf16(trained):
    base = load_file(trained.base / "model.safetensors")
    saved = load_file(trained.out / "adapter_model.safetensors")
    names = [name for name in base if "norm" in name or "embed_tokens" in name]
    assert len(names) == 6
    for name in names:
        assert saved[f"base_model.model.{name}"].dtype == torch.float32
        moved = (saved[f"base_model.model.{name}"] != base[name].bfloat16().float()).float().mean()
        assert moved > 0.9 if "norm" in name else moved > 0.05, name


def test_runs_config_has_the_new_context(trained):
    config = AutoConfig.from_pretrained(trained.out)
    assert config.max_position_embeddings == TARGET
    assert config.rope_parameters["rope_type"] == "yarn"
    assert config.rope_parameters["factor"] == TARGET / CONTEXT
    assert config.rope_parameters["original_max_position_embeddings"] == CONTEXT


def stock_logits(trained, tokens):
    """Base model and adapter, loaded without the plugin."""
    model = AutoModelForCausalLM.from_pretrained(
        trained.base, config=AutoConfig.from_pretrained(trained.out), dtype=torch.float32
    )
    with torch.no_grad():
        return PeftModel.from_pretrained(model, trained.out).eval()(tokens).logits


@pytest.mark.parametrize("method", ["memory_efficient", "legacy"])
def test_merged_model_is_the_trained_one(trained, method):
    merged_dir = trained.out / "merged"
    if method == "legacy":
        merge_lora(trained.recipe, merge_method=method)
    else:
        run_axolotl("merge-lora", trained.recipe, "--merge-method", method)
    config = json.loads((merged_dir / "config.json").read_text())
    expected = json.loads((trained.out / "config.json").read_text())
    assert config["rope_parameters"] == expected["rope_parameters"]
    for field in ("rope_theta", "rope_scaling"):  # for readers that know only these
        assert config[field] == expected[field]
    assert config["rope_scaling"]["type"] == "yarn"
    assert config["max_position_embeddings"] == TARGET

    merged = AutoModelForCausalLM.from_pretrained(merged_dir, dtype=torch.float32).eval()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    tokens = torch.arange(3, 203)[None] % 300
    with torch.no_grad():
        logits = merged(tokens).logits
    # The base is stored in fp32, the legacy merge saves in the run's bf16.
    tolerance = 1e-4 if method == "memory_efficient" else 2e-2
    torch.testing.assert_close(logits, stock_logits(trained, tokens), atol=tolerance, rtol=0.02)
    assert not list(merged_dir.glob("*.bin"))
    assert not list(merged_dir.glob("*.partial"))


def test_axolotl_evaluate_scores_the_adapter(trained, tiny_dataset, tmp_path):
    recipe = yaml.safe_load(trained.recipe.read_text())
    recipe["val_set_size"] = 0.2
    path = tmp_path / "evaluate.yml"
    path.write_text(yaml.safe_dump(recipe))
    run = run_axolotl("evaluate", path, "--launcher", "python", "--lora-model-dir", trained.out)
    assert "eval_loss" in run.log


def test_default_launcher_trains_a_two_line_recipe(tmp_path, tiny_model_dir, tiny_dataset):
    recipe = write_recipe(tmp_path, tiny_model_dir("plain"), tiny_dataset, max_steps=2)
    run = run_axolotl("train", recipe)
    assert "'rope_type': 'yarn', 'factor': 4.0" in run.log.replace('"', "'")
    assert "shifted attention (s2): 2 layers" in run.log
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_full_fine_tune_takes_the_block_without_an_adapter(tmp_path, tiny_model_dir, tiny_dataset):
    recipe = write_recipe(
        tmp_path,
        tiny_model_dir("plain"),
        tiny_dataset,
        adapter=None,
        max_steps=2,
        longlora={"rope": "linear"},
    )
    run = trainer_runs.train(recipe).ok()
    assert "shifted attention (s2): 2 layers" in run.log
    assert "beside LoRA" not in run.log
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert (config.rope_parameters["rope_type"], config.max_position_embeddings) == (
        "linear",
        TARGET,
    )


def test_wrong_recipe_is_one_error_and_touches_nothing(tmp_path, tiny_model_dir, tiny_dataset):
    recipe = write_recipe(
        tmp_path, tiny_model_dir("plain"), tiny_dataset, longlora={"group_sise": 8}
    )
    run = run_axolotl("train", recipe, "--launcher", "python", check=False)
    assert run.code != 0
    assert "group_sise is not a key of the longlora block; did you mean 'group_size'?" in run.log
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "prepared").exists()


def test_s2_attention_of_old_axolotl_is_refused(tmp_path, tiny_model_dir, tiny_dataset):
    from axolotl.cli.config import load_cfg

    recipe = write_recipe(tmp_path, tiny_model_dir("plain"), tiny_dataset, s2_attention=True)
    with pytest.raises(DeprecationWarning, match="s2_attention"):
        load_cfg(str(recipe))


def test_plugin_without_our_keys_changes_nothing(tmp_path, tiny_model_dir, tiny_dataset):
    results = []
    for name, plugins in (("with", ["longlora_plugin.LongLoRAPlugin"]), ("without", [])):
        (tmp_path / name).mkdir()
        recipe = write_recipe(
            tmp_path / name,
            tiny_model_dir("plain"),
            tiny_dataset,
            adapter="lora",
            plugins=plugins,
            sequence_len=CONTEXT,
            lora_r=4,
            lora_alpha=8,
            lora_target_linear=True,
            max_steps=3,
        )
        results.append(train_in_process(recipe))
    with_plugin, without = results
    assert with_plugin.keys() == without.keys()
    assert all(torch.equal(with_plugin[name], without[name]) for name in without)


def test_packed_rows_train_as_their_documents_alone(tmp_path, tiny_model_dir, tiny_text):
    """What Axolotl's sample packing really passes."""
    from transformers import LlamaForCausalLM

    from longlora_plugin.attention import enable_shifted_attention

    data, record = tmp_path / "short.jsonl", tmp_path / "batch.pt"
    pieces = [tiny_text[i * 150 : i * 150 + 60 + 7 * (i % 9)] for i in range(60)]
    data.write_text("".join(json.dumps({"text": piece}) + "\n" for piece in pieces))
    recipe = write_recipe(
        tmp_path,
        tiny_model_dir("plain"),
        data,
        plugins=["longlora_plugin.LongLoRAPlugin", "batch_recorder.BatchRecorder"],
        sample_packing=True,
        max_steps=1,
        longlora={"group_size": 8, "rope": "linear", "full_attention_steps": 0},
    )
    trainer_runs.train(recipe, env={"BATCH_RECORD": str(record)}).ok()
    batch = torch.load(record, weights_only=True)
    rows = batch["input_ids"].shape[0]
    assert len(batch["documents"]) > 2 * rows, "the rows were not packed"

    # Before the first step LoRA adds nothing, so the base with the run's RoPE is the oracle.
    config = AutoConfig.from_pretrained(tmp_path / "out")
    alone = LlamaForCausalLM.from_pretrained(tiny_model_dir("plain"), config=config).train()
    handle = enable_shifted_attention(alone, group_size=8)
    tokens, labels = batch["input_ids"].reshape(1, -1), batch["labels"]
    # With gradients: a pass without them uses full attention.
    logits = torch.cat(
        [alone(tokens[:, s : s + n]).logits for s, n in batch["documents"]], dim=1
    ).view(rows, -1, config.vocab_size)
    handle.remove()
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    ).detach()
    torch.testing.assert_close(batch["loss"], expected, atol=1e-5, rtol=1e-5)

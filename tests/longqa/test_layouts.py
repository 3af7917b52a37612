"""Both layouts load with Axolotl's stock dataset types, no code of ours in the recipe."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from longqa_material import save_stories, save_tokenizer

from longlora_plugin.cli import longlora

for package in ("sentencex", "datasketch"):
    pytest.importorskip(package)

CONTEXT = 1000
RECIPES = Path(__file__).parents[2] / "examples" / "configs"


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("layout", "dataset"),
    [
        ("alpaca", {"type": "alpaca"}),
        ("chat", {"type": "chat_template", "chat_template": "chatml"}),
    ],
)
def test_rows_are_tokenized_whole_by_the_stock_type_and_only_answers_are_trained(
    tmp_path, layout, dataset
):
    from axolotl.utils.chat_templates import get_chat_template
    from axolotl.utils.data.wrappers import get_dataset_wrapper
    from axolotl.utils.dict import DictDefault
    from datasets import Dataset
    from transformers import AutoTokenizer

    folder = save_tokenizer(tmp_path / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if layout == "chat":
        tokenizer.chat_template = get_chat_template("chatml")
        tokenizer.save_pretrained(folder)
    out = tmp_path / "a.jsonl"
    arguments = ["longqa", "build", save_stories(tmp_path / "docs"), out, "--layout", layout]
    arguments += ["--tokenizer", folder, "--context", CONTEXT]
    result = CliRunner().invoke(longlora, [str(part) for part in arguments])
    assert result.exit_code == 0, result.output

    loaded = Dataset.from_json(str(out), cache_dir=str(tmp_path / "cache"))
    cfg = DictDefault(sequence_len=CONTEXT, train_on_inputs=False, dataset_num_proc=1)
    config = DictDefault(path=str(out), ds_type="json", **dataset)
    base = dataset["type"].split(".")[0]
    wrapped, _ = get_dataset_wrapper(config, tokenizer, cfg, base, loaded)
    assert len(wrapped) == len(loaded) > 10
    for row, tokens in zip(loaded, wrapped, strict=True):
        assert len(tokens["input_ids"]) <= CONTEXT
        trained = [token for token in tokens["labels"] if token != -100]
        answer = row["output"] if layout == "alpaca" else row["messages"][1]["content"]
        assert answer in tokenizer.decode(trained)
        asked = row["instruction"] if layout == "alpaca" else row["messages"][0]["content"]
        assert asked in tokenizer.decode(tokens["input_ids"])
        assert asked[:200] not in tokenizer.decode(trained)


@pytest.mark.parametrize("name", ["sft-longalpaca.yml", "sft-longqa-local.yml"])
def test_the_recipes_have_the_papers_settings_for_fine_tuning(name):
    recipe = yaml.safe_load((RECIPES / name).read_text())
    assert recipe["plugins"] == ["longlora_plugin.LongLoRAPlugin"]
    assert recipe["adapter"] == "longlora"
    assert float(recipe["learning_rate"]) == 2e-5
    assert (recipe["adam_beta1"], recipe["adam_beta2"]) == (0.9, 0.95)
    assert (recipe["weight_decay"], recipe["num_epochs"], recipe["warmup_steps"]) == (0.0, 5, 20)
    assert recipe["lr_scheduler"] == "constant_with_warmup"
    assert recipe["micro_batch_size"] * recipe["gradient_accumulation_steps"] == 8
    assert [dataset["type"] for dataset in recipe["datasets"]] == ["alpaca"]

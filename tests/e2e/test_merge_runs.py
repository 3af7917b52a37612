"""Runs of Axolotl whose result is merged: tokens that were added, a base that is already scaled."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from axolotl_runs import merge_lora, train_in_process, write_recipe
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 10000.0,
}
TOKENS = torch.arange(3, 203)[None]


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def limit_of(folder: Path) -> int:
    return json.loads((folder / "tokenizer_config.json").read_text())["model_max_length"]


@pytest.mark.parametrize("rope", [None, LLAMA3], ids=["unscaled", "already scaled"])
@pytest.mark.parametrize("method", ["memory_efficient", "legacy"])
def test_run_with_an_added_pad_token_merges_and_raises_every_limit(
    tmp_path, tiny_model_dir, tiny_dataset, rope, method
):
    options = {} if rope is None else {"rope_parameters": rope}
    base = tiny_model_dir(f"limits-{rope is not None}", **options)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.model_max_length = 64
    tokenizer.save_pretrained(base)
    recipe = write_recipe(
        tmp_path,
        base,
        tiny_dataset,
        max_steps=2,
        save_steps=1,
        save_strategy="steps",
        learning_rate=1e-2,
        special_tokens={"pad_token": "<a pad of its own>"},
        longlora={"rope": "linear" if rope is None else "llama3"},
    )
    train_in_process(recipe)
    out = tmp_path / "out"
    merged = merge_lora(recipe, merge_method=method)
    assert {limit_of(each) for each in (out, out / "checkpoint-1", merged)} == {256}
    rows = len(tokenizer) + 1
    model = AutoModelForCausalLM.from_pretrained(
        base, config=AutoConfig.from_pretrained(out, vocab_size=len(tokenizer)), dtype=torch.float32
    )
    model.resize_token_embeddings(rows, mean_resizing=False)
    expected = logits(PeftModel.from_pretrained(model, out))
    result = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    assert result.config.vocab_size == rows
    assert (logits(result) - expected).abs().max() < 3e-5

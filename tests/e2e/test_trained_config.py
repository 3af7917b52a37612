"""What a run trained with is what `eval` measures, whatever the recipe says by now."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from trainer_runs import train, write_recipe
from transformers import AutoConfig, AutoModelForCausalLM, MistralConfig, MistralForCausalLM

from longlora_plugin.evaluation.models import model_sources
from longlora_plugin.run.recipe import read_recipe

WINDOW = 16
TOKENS = torch.arange(3, 203)[None]


@pytest.fixture
def base(tmp_path, tiny_tokenizer):
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=len(tiny_tokenizer) + 5,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        sliding_window=WINDOW,
        initializer_range=0.2,
    )
    MistralForCausalLM(config).save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_window_and_length_of_the_training_command_are_measured_and_told(
    base, tmp_path, tiny_dataset
):
    keys = {"longlora": {"rope": "linear", "original_context": 64}, "max_steps": 2}
    trained = {**keys, "sequence_len": 256, "model_config": {"sliding_window": None}}
    run = train(write_recipe(tmp_path, base, tiny_dataset, trained)).ok()
    recipe = write_recipe(tmp_path, base, tiny_dataset, {**keys, "sequence_len": 128})
    source = model_sources(read_recipe(recipe), ["adapter"])[0]
    assert source.config.sliding_window is None
    assert source.rope["factor"] == 4.0
    assert {note.split(": ")[1] for note in source.notes} == {
        "max_position_embeddings",
        "rope_parameters",
        "sliding_window",
    }
    config = AutoConfig.from_pretrained(base)
    config.sliding_window = None
    config.rope_parameters = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    config.max_position_embeddings = 256
    plain = AutoModelForCausalLM.from_pretrained(base, config=config, dtype=torch.float32)
    with torch.no_grad():
        expected = PeftModel.from_pretrained(plain, run.output_dir).eval()(TOKENS).logits
        found = source.load("cpu", torch.float32).model(TOKENS).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)

"""`load_model` against transformers and PEFT given the trained config by hand."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from axolotl_runs import TARGET, make_adapter, scaled
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from longlora_plugin.artifacts.load import load_model
from longlora_plugin.artifacts.manifest import Manifest, write_manifest

TOKENS = torch.arange(3, 203)[None] % 300


def logits_of(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits.float()


@pytest.fixture(scope="module")
def base(tiny_model_dir):
    return tiny_model_dir("load", tie_word_embeddings=True, initializer_range=0.2)


@pytest.fixture
def adapter(base, tmp_path):
    make_adapter(base, tmp_path / "run")
    return tmp_path / "run"


def right_logits(base, adapter) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(base, config=scaled(base), dtype=torch.float32)
    return logits_of(PeftModel.from_pretrained(model, adapter))


def test_an_adapter_gets_the_rope_of_its_own_config(base, adapter):
    unscaled = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    wrong = logits_of(PeftModel.from_pretrained(unscaled, adapter))
    expected = right_logits(base, adapter)
    assert (wrong - expected).abs().max() > 1e-2
    torch.testing.assert_close(logits_of(load_model(adapter, dtype=torch.float32)), expected)
    assert not load_model(str(adapter)).training


@pytest.mark.parametrize("name", ["config.json", "adapter_config.json", "tokenizer.json"])
def test_an_adapter_with_a_later_runs_files_is_refused_by_name(base, adapter, name):
    path = adapter / name
    write_manifest(adapter, Manifest(str(base), TARGET))
    saved = json.loads(path.read_text())
    # What means the same is no change: a set that PEFT wrote in another order.
    other = {**saved, "use_cache": False, "inference_mode": False}
    other |= {key: value[::-1] for key, value in saved.items() if key == "target_modules"}
    path.write_text(json.dumps(other))
    load_model(adapter)
    path.write_text(json.dumps({**saved, "attention_dropout": 0.25, "lora_alpha": 64}))
    with pytest.raises(ValueError, match=rf"saved with another {name}.*delete longlora\.json"):
        load_model(adapter)


@pytest.mark.parametrize("kept", ["config.json", "longlora.json"])
def test_one_of_the_two_files_is_enough(base, adapter, kept):
    expected = right_logits(base, adapter)
    config = scaled(base)
    fields = {"rope_parameters": config.rope_parameters, "max_position_embeddings": TARGET}
    write_manifest(adapter, Manifest(str(base), TARGET, config_fields=fields))
    for name in {"config.json", "longlora.json"} - {kept}:
        (adapter / name).unlink()
    torch.testing.assert_close(logits_of(load_model(adapter, dtype=torch.float32)), expected)


def test_an_adapter_that_does_not_say_its_rope_is_refused(adapter):
    (adapter / "config.json").unlink()
    with pytest.raises(ValueError, match=r"neither longlora\.json nor config\.json.*copy"):
        load_model(adapter)


def test_rows_of_added_tokens_are_loaded(base, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(base)
    grown = tmp_path / "grown"
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    rows = len(tokenizer) + 5
    model.resize_token_embeddings(rows, mean_resizing=False)
    model.save_pretrained(grown)
    tokenizer.save_pretrained(grown)
    make_adapter(grown, tmp_path / "run")
    expected = right_logits(grown, tmp_path / "run")
    config = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(base)
    (tmp_path / "run" / "adapter_config.json").write_text(json.dumps(config))
    loaded = load_model(tmp_path / "run", dtype=torch.float32)
    assert loaded.get_input_embeddings().weight.shape[0] == rows
    torch.testing.assert_close(logits_of(loaded), expected)


def test_how_training_loaded_the_base_does_not_quantize_it(adapter, base):
    config = json.loads((adapter / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (adapter / "config.json").write_text(json.dumps(config))
    torch.testing.assert_close(
        logits_of(load_model(adapter, dtype=torch.float32)), right_logits(base, adapter)
    )


def test_a_whole_model_is_loaded_as_it_is(base, tmp_path):
    merged = tmp_path / "merged"
    shutil.copytree(base, merged)
    scaled(base).save_pretrained(merged)
    loaded = load_model(merged, dtype=torch.float32)
    assert loaded.config.max_position_embeddings == TARGET
    assert not isinstance(loaded, PeftModel)


def test_a_folder_of_neither_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"neither adapter_config\.json nor config\.json"):
        load_model(tmp_path)
    with pytest.raises(ValueError, match="no folder"):
        load_model(tmp_path / "absent")


def test_a_reward_adapter_keeps_its_head(base, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(base, num_labels=1)
    model = AutoModelForSequenceClassification.from_pretrained(base, config=config)
    peft_model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"]))
    peft_model.save_pretrained(tmp_path)
    config.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = peft_model.eval()(TOKENS).logits
        torch.testing.assert_close(load_model(tmp_path)(TOKENS).logits, expected)

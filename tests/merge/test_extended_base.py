"""The loaders of PEFT and transformers, as everyone writes them, on an extended base's folder."""

from __future__ import annotations

import json
import os

import pytest
import torch
from axolotl_runs import FACTOR, TARGET, make_adapter, scaled
from click.testing import CliRunner
from hub import put_on_hub
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from longlora_plugin.artifacts.load import load_model
from longlora_plugin.cli import longlora

TOKENS = torch.arange(3, 203)[None] % 300


def logits_of(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits.float()


def extend_base(*arguments: object):
    return CliRunner().invoke(longlora, ["extend-base", *map(str, arguments)])


@pytest.fixture(params=["tied", "untied"])
def base(tiny_model_dir, request):
    tied = request.param == "tied"
    return tiny_model_dir(f"extended-{tied}", tie_word_embeddings=tied, initializer_range=0.2)


@pytest.fixture
def run(base, tmp_path):
    make_adapter(base, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def right(base, run):
    model = AutoModelForCausalLM.from_pretrained(base, config=scaled(base), dtype=torch.float32)
    return logits_of(PeftModel.from_pretrained(model, run))


def test_pefts_loaders_are_wrong_without_and_right_with_it(base, run, tmp_path, right):
    before = AutoPeftModelForCausalLM.from_pretrained(run, dtype=torch.float32)
    assert (logits_of(before) - right).abs().max() > 1e-2
    done = extend_base(run, tmp_path / "extended")
    assert done.exit_code == 0, done.output
    loaded = AutoPeftModelForCausalLM.from_pretrained(run, dtype=torch.float32)
    torch.testing.assert_close(logits_of(loaded), right)
    on_base = AutoModelForCausalLM.from_pretrained(tmp_path / "extended", dtype=torch.float32)
    assert on_base.config.max_position_embeddings == TARGET
    torch.testing.assert_close(logits_of(PeftModel.from_pretrained(on_base, run)), right)
    torch.testing.assert_close(logits_of(load_model(run, dtype=torch.float32)), right)


def test_lora_on_the_hub_is_right_in_transformers_own_loader(base, tmp_path, monkeypatch):
    """There the adapter's repository is no local folder, and the config is its base model's.

    transformers loads trained embeddings and norms of an adapter from 5.24 on only.
    """
    run = tmp_path / "lora"
    make_adapter(base, run)
    tensors = load_file(run / "adapter_model.safetensors")
    lora = {name: tensor for name, tensor in tensors.items() if "lora_" in name}
    save_file(lora, run / "adapter_model.safetensors", metadata={"format": "pt"})
    path = run / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "modules_to_save": None}))
    model = AutoModelForCausalLM.from_pretrained(base, config=scaled(base), dtype=torch.float32)
    expected = logits_of(PeftModel.from_pretrained(model, run))
    assert extend_base(run, tmp_path / "extended").exit_code == 0
    put_on_hub(run, "me/lora", tmp_path / "hub", monkeypatch)
    loaded = AutoModelForCausalLM.from_pretrained("me/lora", dtype=torch.float32)
    torch.testing.assert_close(logits_of(loaded), expected)


def test_weights_are_links_and_the_base_stays_as_it_was(base, run, tmp_path):
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    assert extend_base(run, tmp_path / "extended").exit_code == 0
    weights = "model.safetensors"
    assert os.path.samefile(base / weights, tmp_path / "extended" / weights)
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before
    config = json.loads((tmp_path / "extended" / "config.json").read_text())
    assert config["rope_parameters"]["factor"] == config["rope_scaling"]["factor"] == FACTOR
    assert AutoTokenizer.from_pretrained(tmp_path / "extended").model_max_length >= TARGET


def test_a_second_one_is_made_from_the_real_base(base, run, tmp_path, right):
    assert extend_base(run, tmp_path / "one").exit_code == 0
    assert extend_base(run, tmp_path / "two").exit_code == 0
    for path in (tmp_path / "one").iterdir():
        path.unlink()
    loaded = AutoPeftModelForCausalLM.from_pretrained(run, dtype=torch.float32)
    torch.testing.assert_close(logits_of(loaded), right)


def test_what_is_there_is_not_replaced(run, tmp_path):
    kept = tmp_path / "notes"
    kept.mkdir()
    (kept / "mine.txt").write_text("mine")
    done = extend_base(run, kept)
    assert done.exit_code == 1
    assert "exists" in done.output
    assert [path.name for path in kept.iterdir()] == ["mine.txt"]
    (run / "adapter_config.json").unlink()
    assert "adapter_config.json" in extend_base(run, tmp_path / "new").output

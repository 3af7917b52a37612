"""The file of a finished adapter: smaller, and still PEFT's."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from longlora_plugin.adapter.modules import norm_modules, shortest_names
from longlora_plugin.adapter.state import embedding_tables, shrink_saved_adapter

ROWS = 97
IDS = torch.arange(3, 43)[None]


def base(tied: bool):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=ROWS,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=tied,
    )
    return AutoModelForCausalLM.from_config(config)


def trained(tied: bool, rows: int = ROWS, **options):
    """A PEFT model whose every trained tensor was moved."""
    model = base(tied)
    if rows != ROWS:
        model.resize_token_embeddings(rows, mean_resizing=False)
    targets = ["q_proj", *options.pop("targets", ())]
    peft_model = get_peft_model(model, LoraConfig(r=4, target_modules=targets, **options))
    with torch.no_grad():
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return peft_model


def logits_of(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def saved(model, folder, *, rows: int = ROWS, dtype=torch.float32) -> dict[str, torch.Tensor]:
    model.save_pretrained(folder)
    shrink_saved_adapter(folder, embedding_tables(model), base_rows=ROWS, dtype=dtype)
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("tied", [True, False])
def test_lora_on_embeddings_is_saved_without_the_bases_own_table(tmp_path, tied):
    model = trained(tied, targets=["embed_tokens"])
    expected = logits_of(model)
    model.save_pretrained(tmp_path)
    whole = load_file(tmp_path / "adapter_model.safetensors")
    assert any("base_layer" in name for name in whole), "PEFT saves it"
    tensors = saved(model, tmp_path)
    assert all("lora_" in name for name in tensors)
    assert sum(t.numel() for t in tensors.values()) < ROWS * 32
    loaded = PeftModel.from_pretrained(base(tied), tmp_path)
    torch.testing.assert_close(logits_of(loaded), expected)


def test_a_table_with_new_rows_is_kept(tmp_path):
    model = trained(False, rows=ROWS + 3, targets=["embed_tokens"])
    assert any("base_layer" in name for name in saved(model, tmp_path))


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_in_bf16_are_the_rounded_ones_and_all_else_stays(tmp_path, tied):
    norms = shortest_names(base(tied), norm_modules(base(tied)))
    model = trained(tied, modules_to_save=["embed_tokens", *norms], ensure_weight_tying=tied)
    exact = saved(model, tmp_path / "exact")
    rounded = saved(model, tmp_path / "rounded", dtype=torch.bfloat16)
    assert exact.keys() == rounded.keys()
    tables = {name for name in exact if "embed_tokens" in name or "lm_head" in name}
    assert tables
    for name, tensor in exact.items():
        expected = tensor.bfloat16() if name in tables else tensor
        assert torch.equal(rounded[name], expected), name
        assert rounded[name].dtype == expected.dtype, name
    loaded = PeftModel.from_pretrained(base(tied), tmp_path / "rounded")
    difference = (logits_of(loaded) - logits_of(model)).abs().max()
    assert 0 < difference < 1e-2

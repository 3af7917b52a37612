"""Everything that PEFT saves in a LoRA adapter: merged right, or refused with the reason.

The files are PEFT's own; the reference is `PeftModel.from_pretrained` on the base model in float32.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from adapters import base_folder, logits, move_and_save, wrapped
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from longlora_plugin.merge import stored
from longlora_plugin.merge.folder import Source, merge


def load(folder: Path, kind: type = AutoModelForCausalLM, **options: object) -> torch.nn.Module:
    return kind.from_pretrained(folder, dtype=torch.float32, **options)


def merged(base: Path, adapter: Path) -> Path:
    target = adapter.with_name("merged")
    merge(Source(adapter, base, AutoConfig.from_pretrained(base)), target)
    return target


def assert_merged(base: Path, adapter: Path, rows: int | None = None) -> Path:
    model = load(base)
    plain = logits(model)
    if rows is not None:
        model.resize_token_embeddings(rows, mean_resizing=False)
    expected = logits(PeftModel.from_pretrained(model, adapter))
    target = merged(base, adapter)
    got = logits(load(target))
    assert got.shape == expected.shape
    assert (got - expected).abs().max() < 3e-5
    assert rows is not None or (expected - plain).abs().max() > 1e-3
    return target


LLAMA_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS: dict[str, tuple[dict[str, object], dict[str, object]]] = {
    "every linear layer": ({}, {"target_modules": LLAMA_LINEAR}),
    "output head": ({}, {"target_modules": ["lm_head", "q_proj"], "modules_to_save": None}),
    "embeddings": ({}, {"target_modules": ["embed_tokens", "q_proj"], "modules_to_save": None}),
    "embeddings, tied": (
        {"tie_word_embeddings": True},
        {
            "target_modules": ["embed_tokens", "q_proj"],
            "modules_to_save": None,
            "ensure_weight_tying": False,
        },
    ),
    "embeddings and head, tied": (
        {"tie_word_embeddings": True},
        {
            "target_modules": ["embed_tokens", "q_proj"],
            "modules_to_save": None,
            "ensure_weight_tying": True,
        },
    ),
    "trained embeddings, tied, head left": (
        {"tie_word_embeddings": True},
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": False},
    ),
    "trained head": ({}, {"modules_to_save": ["lm_head", "embed_tokens"]}),
    "trained linear layer": ({}, {"modules_to_save": ["down_proj"]}),
    "trained biases": (
        {"family": "gpt_neox"},
        {"target_modules": ["query_key_value"], "modules_to_save": ["final_layer_norm", "dense"]},
    ),
    "conv1d": ({"family": "gpt2"}, {"target_modules": ["c_attn", "c_fc"]}),
    "all biases": (
        {"family": "gpt_neox"},
        {"target_modules": ["query_key_value"], "modules_to_save": None, "bias": "all"},
    ),
    "biases of LoRA's layers": (
        {"attention_bias": True},
        {"modules_to_save": None, "bias": "lora_only"},
    ),
    "lora_bias": ({"attention_bias": True}, {"modules_to_save": None, "lora_bias": True}),
    "dora": ({}, {"use_dora": True, "target_modules": LLAMA_LINEAR}),
    "dora of embeddings": (
        {},
        {"use_dora": True, "target_modules": ["embed_tokens"], "modules_to_save": None},
    ),
    "dora of conv1d": ({"family": "gpt2"}, {"use_dora": True, "target_modules": ["c_attn"]}),
    "rslora": ({}, {"use_rslora": True}),
    "rank and alpha patterns": (
        {},
        {"rank_pattern": {"q_proj": 2, "layers.1.v_proj": 6}, "alpha_pattern": {"q_proj": 32}},
    ),
    "one layer": ({}, {"layers_to_transform": [1], "modules_to_save": None}),
    "gaussian": ({}, {"init_lora_weights": "gaussian"}),
    "orthogonal": ({}, {"init_lora_weights": "orthogonal"}),
    "pissa": ({}, {"init_lora_weights": "pissa"}),
    "olora": ({}, {"init_lora_weights": "olora"}),
    "trained tokens": ({}, {"trainable_token_indices": [3, 5], "modules_to_save": None}),
    "trained tokens, tied": (
        {"tie_word_embeddings": True},
        {"trainable_token_indices": [3, 5], "modules_to_save": None},
    ),
    "trained tokens of both tables": (
        {},
        {
            "trainable_token_indices": {"embed_tokens": [3], "lm_head": [4, 9]},
            "modules_to_save": None,
        },
    ),
    "one parameter": (
        {},
        {"target_parameters": ["q_proj.weight"], "target_modules": [], "modules_to_save": None},
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_peft_saves_is_merged(tmp_path, kind):
    of_base, of_adapter = KINDS[kind]
    base = base_folder(tmp_path, **of_base)
    move_and_save(wrapped(load(base), **of_adapter), tmp_path / "adapter")
    target = assert_merged(base, tmp_path / "adapter")
    tied = load(target).config.tie_word_embeddings
    assert tied == (kind in ("embeddings and head, tied", "trained tokens, tied"))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rows", [61, 64, 50])
@pytest.mark.parametrize("trained", [True, False])
def test_added_and_removed_rows_are_merged(tmp_path, tied, rows, trained):
    base = base_folder(tmp_path, tie_word_embeddings=tied)
    model = load(base)
    model.resize_token_embeddings(rows, mean_resizing=False)
    options = {} if trained else {"modules_to_save": None}
    peft_model = wrapped(model, **options)
    peft_model.config.save_pretrained(tmp_path / "adapter")
    move_and_save(peft_model, tmp_path / "adapter")
    target = assert_merged(base, tmp_path / "adapter", rows)
    assert load(target).config.vocab_size == rows
    assert load(target).config.tie_word_embeddings == tied


def test_reward_head_is_merged_into_a_model_with_that_head(tmp_path):
    base = base_folder(tmp_path)
    classify = AutoModelForSequenceClassification
    model = load(base, classify, num_labels=1)
    peft_model = wrapped(model, task_type="SEQ_CLS", modules_to_save=["embed_tokens", "norm"])
    peft_model.config.save_pretrained(tmp_path / "adapter")
    move_and_save(peft_model, tmp_path / "adapter")
    torch.manual_seed(5)
    reference = load(base, classify, num_labels=1)
    expected = logits(PeftModel.from_pretrained(reference, tmp_path / "adapter"))
    target = merged(base, tmp_path / "adapter")
    assert (logits(load(target, classify)) - expected).abs().max() < 3e-5
    assert json.loads((target / "config.json").read_text())["architectures"] == [
        "LlamaForSequenceClassification"
    ]


REFUSED: dict[str, tuple[dict[str, object], str]] = {
    "pissa_niter_4": ({"init_lora_weights": "pissa_niter_4"}, "random draws .* peft_init_lora"),
    "layer replication": (
        {"layer_replication": [[0, 2], [0, 2]], "modules_to_save": None},
        "peft_layer_replication gives the trained model more layers",
    ),
    "lora_bias without a bias": ({"lora_bias": True}, "(?i)lora_bias"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_merged_is_refused_with_the_reason(tmp_path, kind):
    options, reason = REFUSED[kind]
    base = base_folder(tmp_path)
    move_and_save(wrapped(load(base), **options), tmp_path / "adapter")
    with pytest.raises(ValueError, match=f"(?s){reason}"):
        merged(base, tmp_path / "adapter")
    assert not (tmp_path / "merged").exists()


def test_another_method_than_lora_is_refused_by_name(tmp_path):
    from peft import IA3Config, get_peft_model

    base = base_folder(tmp_path)
    config = IA3Config(target_modules=["q_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    move_and_save(get_peft_model(load(base), config), tmp_path / "adapter")
    with pytest.raises(ValueError, match="it is a IA3 adapter: only LoRA"):
        merged(base, tmp_path / "adapter")


def test_layers_that_predict_several_tokens_are_passed_on(tmp_path):
    base = base_folder(tmp_path)
    tensors = load_file(base / stored.WHOLE)
    tensors["model.layers.2.eh_proj.weight"] = torch.ones(2, 2)
    save_file(tensors, base / stored.WHOLE, metadata={"format": "pt"})
    move_and_save(wrapped(load(base)), tmp_path / "adapter")
    target = merged(base, tmp_path / "adapter")
    assert load_file(target / stored.WHOLE)["model.layers.2.eh_proj.weight"].sum() == 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_base_in_16_bits_keeps_its_dtype_and_gets_the_update_rounded_once(tmp_path, dtype):
    base = base_folder(tmp_path)
    load(base).to(dtype).save_pretrained(base)
    move_and_save(wrapped(load(base)), tmp_path / "adapter")
    held = load_file(merged(base, tmp_path / "adapter") / stored.WHOLE)
    original = load_file(base / stored.WHOLE)
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    name = "model.layers.1.self_attn.q_proj"
    a, b = (saved[f"base_model.model.{name}.lora_{each}.weight"] for each in "AB")
    assert torch.equal(
        held[f"{name}.weight"], (original[f"{name}.weight"].float() + b @ a * 2).to(dtype)
    )
    assert {tensor.dtype for tensor in held.values()} == {dtype}


def test_old_base_in_pytorch_bin_is_merged(tmp_path):
    base = base_folder(tmp_path)
    model = load(base)
    (base / stored.WHOLE).unlink()
    torch.save(model.state_dict(), base / stored.BIN)
    move_and_save(wrapped(load(base)), tmp_path / "adapter")
    target = assert_merged(base, tmp_path / "adapter")
    assert not (target / stored.BIN).exists()

"""Model cards: what PEFT, transformers and Axolotl wrote is replaced, what a user wrote stays."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from threading import Timer

import pytest
from axolotl_runs import make_adapter
from huggingface_hub import ModelCard

from longlora_plugin.artifacts.callback import SaveArtifacts
from longlora_plugin.artifacts.card import BEGIN, END, write_card
from longlora_plugin.artifacts.load import load_model
from longlora_plugin.artifacts.manifest import Manifest, read_manifest, write_manifest
from longlora_plugin.rope.spelling import rope_fields


@pytest.fixture
def manifest(tmp_path) -> Manifest:
    return Manifest(
        "someone/base-7b",
        32768,
        adapter="longlora",
        rope_preset="yarn",
        rope_reason="the base model is not scaled",
        rope_parameters={"rope_type": "yarn", "factor": 8.0, "rope_theta": 10000.0},
        pretrained_context=4096,
        base_context=4096,
        group_size=8192,
        attention_pattern="s2",
        covered_layers=32,
        steps=100,
        full_attention_steps=10,
        trainable=["embeddings", "norms"],
        trained_modules=66,
        trained_parameters=131_338_240,
        recipe={"base_model": "someone/base-7b", "sequence_len": 32768},
        versions={"axolotl": "0.19.0"},
        results=[{"metric": "perplexity", "length": 32768, "value": 7.51234}],
    )


def test_pefts_empty_template_is_replaced(tmp_path, tiny_model_dir, manifest):
    make_adapter(tiny_model_dir("card", tie_word_embeddings=True), tmp_path / "run")
    template = (tmp_path / "run" / "README.md").read_text()
    assert "More Information Needed" in template
    write_card(tmp_path / "run", manifest, "adapter")
    text = (tmp_path / "run" / "README.md").read_text()
    for wrong in ("More Information Needed", "trained from scratch", "Model ID"):
        assert wrong not in text
    for right in (
        "4,096 (pretraining)",
        "32,768 (trained for)",
        "yarn (the base model is not scaled)",
        "groups of 8,192 tokens, 32 layers",
        "the last 10 of 100 steps",
        "embeddings, norms (131,338,240 parameters)",
        "AutoPeftModelForCausalLM",
        "| perplexity | 32768 | 7.512 |",
        "axolotl 0.19.0",
        "sequence_len: 32768",
    ):
        assert right in text, right
    card = ModelCard(text)
    assert card.data.tags[:2] == ["longlora", "long-context"]
    assert card.data.base_model == "someone/base-7b"
    assert card.data.library_name == "peft"
    assert card.data.to_dict()["base_model_relation"] == "adapter"


def test_the_cards_code_loads_the_adapter_with_its_rope(tmp_path, tiny_model_dir, monkeypatch):
    import torch

    base = tiny_model_dir("card-code", tie_word_embeddings=True, initializer_range=0.2)
    make_adapter(base, tmp_path / "run")
    load_tokenizer = base / "tokenizer.json"
    (tmp_path / "run" / "tokenizer.json").write_bytes(load_tokenizer.read_bytes())
    write_card(tmp_path / "run", Manifest(str(base), 256, adapter="longlora"), "adapter")
    text = (tmp_path / "run" / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert code
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code[1], names)
    tokens = torch.arange(3, 203)[None] % 300
    with torch.no_grad():
        expected = load_model(tmp_path / "run", dtype=torch.float32)(tokens).logits
        torch.testing.assert_close(names["model"].eval()(tokens).logits, expected)


def test_a_merged_folder_does_not_keep_the_base_models_card(tmp_path, manifest):
    (tmp_path / "README.md").write_text(
        "---\nlicense: apache-2.0\nlanguage: en\ntags: [base-tag]\nmodel-index:\n- name: b\n"
        "---\n# base\n\nA context of 256 tokens.\n"
    )
    write_manifest(tmp_path, manifest)
    fields = rope_fields(manifest.rope_parameters, manifest.target_context, "llama")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **fields}))
    write_card(tmp_path, manifest, "merged")
    card = ModelCard.load(tmp_path / "README.md")
    assert "256 tokens" not in card.text
    assert (card.data.license, card.data.language) == ("apache-2.0", "en")
    assert card.data.tags == ["longlora", "long-context"]
    assert card.data.library_name == "transformers"
    for limit in ("--max-model-len", "--context-length", "-c", "num_ctx"):
        assert f"{limit} {manifest.target_context}" in card.text
    assert "Not with" not in card.text


def test_the_card_names_an_engine_that_would_be_wrong(tmp_path, manifest):
    rope = {"rope_type": "dynamic", "factor": 8.0, "rope_theta": 10000.0}
    write_manifest(tmp_path, replace(manifest, rope_parameters=rope))
    fields = rope_fields(rope, 4096, "llama")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **fields}))
    write_card(tmp_path, replace(manifest, rope_parameters=rope), "merged")
    text = (tmp_path / "README.md").read_text()
    assert "Not with vllm: " in text
    assert "vllm serve" not in text
    assert "mlx_lm.server" in text


def test_a_second_time_only_our_part_is_replaced(tmp_path, manifest):
    write_card(tmp_path, manifest, "adapter")
    path = tmp_path / "README.md"
    first = path.read_text()
    write_card(tmp_path, manifest, "adapter")
    assert path.read_text() == first
    path.write_text(first.replace(BEGIN, f"My words before.\n\n{BEGIN}") + "\nMy words after.\n")
    write_card(tmp_path, Manifest("someone/base-7b", 65536), "adapter")
    text = path.read_text()
    assert text.index("My words before.") < text.index(BEGIN)
    assert text.index("My words after.") > text.index(END)
    assert "65,536" in text
    assert "32,768" not in text


def test_a_local_base_is_not_metadata_for_the_hub(tmp_path, manifest):
    write_card(tmp_path, Manifest(str(tmp_path), 64, adapter="lora"), "adapter")
    assert ModelCard.load(tmp_path / "README.md").data.base_model is None


def test_a_tokenizer_that_another_process_is_still_writing_is_waited_for(tmp_path, manifest):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    files = [tmp_path / "tokenizer.json", tmp_path / "tokenizer_config.json"]
    for file in files:
        file.write_text("")
    finished = '{"tokenizer_class": "TokenizersBackend"}'
    writes = Timer(0.5, lambda: [file.write_text(finished) for file in files])
    writes.start()
    SaveArtifacts(manifest, int).finish(tmp_path)
    writes.join()
    assert set(read_manifest(tmp_path).files) == {"config.json", "tokenizer.json"}
    assert "PreTrainedTokenizerFast" in files[1].read_text()

"""`axolotl merge-lora` on LongLoRA's adapters, in this process: the merged folder is the trained
model, and what cannot be merged is refused before anything is written.

Adapters are made with stock PEFT instead of trained: what counts is that every tensor differs.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from axolotl_runs import (
    CONTEXT,
    FACTOR,
    TARGET,
    TEMPLATE,
    make_adapter,
    merge_lora,
    scaled,
    write_recipe,
)
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from longlora_plugin.adapter.state import PREFIX
from longlora_plugin.host import compat
from longlora_plugin.merge import stored

ADAPTER_FILE = "adapter_model.safetensors"
TOKENS = torch.arange(3, 203)[None] % 300
LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
BASES = {
    "tied": ("llama", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "sharded": ("llama", {"num_key_value_heads": 2, "tie_word_embeddings": False}),
    "biases": ("gpt_neox", {}),
}


@pytest.fixture(scope="module")
def material(tmp_path_factory, tiny_tokenizer):
    """Function kind → (base folder, adapter folder); made once, read only."""
    root = tmp_path_factory.mktemp("merge")
    tiny_tokenizer.model_max_length = CONTEXT

    def make(kind: str) -> tuple[Path, Path]:
        base, adapter = root / kind / "base", root / kind / "adapter"
        if not adapter.exists():
            family, options = BASES[kind]
            torch.manual_seed(0)
            config = AutoConfig.for_model(
                family, **{**LLAMA, "vocab_size": len(tiny_tokenizer), **options}
            )
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            model.save_pretrained(base, max_shard_size="100KB" if kind == "sharded" else "1GB")
            GenerationConfig(
                bos_token_id=0, eos_token_id=1, max_length=CONTEXT, repetition_penalty=1.1
            ).save_pretrained(base)
            tiny_tokenizer.save_pretrained(base)
            make_adapter(base, adapter)
        return base, adapter

    return make


@pytest.fixture
def run(tmp_path, material):
    """Function (kind, **recipe keys) → the recipe of a run whose adapter is a copy to spoil."""

    def make(kind: str, **overrides: object) -> Path:
        base, adapter = material(kind)
        shutil.copytree(adapter, tmp_path / "out")
        return write_recipe(tmp_path, base, tmp_path / "no-data.jsonl", **overrides)

    return make


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def logits_of(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits.float()


def stock_logits(base: Path, adapter: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(base, config=scaled(base), dtype=torch.float32)
    return logits_of(PeftModel.from_pretrained(model, adapter))


# ---- the merged folder ----------------------------------------------------------------------


@pytest.mark.parametrize("method", ["memory_efficient", "legacy"])
@pytest.mark.parametrize("kind", BASES)
def test_merged_folder_is_the_trained_model_and_a_second_merge_changes_nothing(
    run, material, kind, method
):
    base, adapter = material(kind)
    recipe = run(kind)
    merged = merge_lora(recipe, merge_method=method)

    config = AutoConfig.from_pretrained(merged)
    assert config.rope_parameters["rope_type"] == "linear"
    assert config.rope_parameters["factor"] == FACTOR
    assert config.max_position_embeddings == TARGET
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    torch.testing.assert_close(logits_of(model), stock_logits(base, adapter), atol=1e-4, rtol=1e-4)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == (kind == "tied")
    generation = GenerationConfig.from_pretrained(merged)
    assert generation.repetition_penalty == 1.1
    assert not generation.do_sample
    assert generation.max_length == TARGET
    tokenizer = AutoTokenizer.from_pretrained(merged)
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.model_max_length == TARGET
    if (merged / stored.INDEX).exists():
        index = json.loads((merged / stored.INDEX).read_text())["weight_map"]
        held = {}
        for shard in merged.glob("*.safetensors"):
            with safe_open(shard, "pt") as file:
                held.update(dict.fromkeys(file.keys(), shard.name))
        assert held == index
    assert (kind == "sharded") == (merged / stored.INDEX).exists()

    before = contents(merged)
    assert not [name for name in before if "partial" in name]
    assert contents(merge_lora(recipe, merge_method=method)) == before


def test_weights_of_a_merge_with_other_files_do_not_stay(run, material):
    base, adapter = material("sharded")
    recipe = run("sharded")
    merged = merge_lora(recipe)
    assert len(list(merged.glob("*.safetensors"))) > 1
    (merged / "results.csv").write_text("kept")
    for path in merged.glob("*.safetensors"):
        path.rename(merged / f"model-{path.name}")
    (merged / stored.INDEX).rename(merged / "pytorch_model.bin.index.json")
    merged = merge_lora(recipe)
    assert all(path.name.startswith("model-0") for path in merged.glob("*.safetensors"))
    assert not (merged / "pytorch_model.bin.index.json").exists()
    assert (merged / "results.csv").read_text() == "kept"
    assert {path.name for path in merged.parent.glob("merged*")} == {"merged"}
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    torch.testing.assert_close(logits_of(model), stock_logits(base, adapter), atol=3e-5, rtol=0)


def test_second_name_of_a_tied_table_in_the_base_is_merged_too(run, material, tmp_path):
    """Some tied bases are stored with both names; PEFT saves the trained table under one."""
    base, adapter = material("tied")
    doubled = tmp_path / "doubled"
    shutil.copytree(base, doubled)
    tensors = load_file(doubled / stored.WHOLE)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, doubled / stored.WHOLE, metadata={"format": "pt"})
    merged = merge_lora(run("tied", base_model=str(doubled)))
    held = load_file(merged / stored.WHOLE)
    assert torch.equal(held["lm_head.weight"], held["model.embed_tokens.weight"])
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    torch.testing.assert_close(logits_of(model), stock_logits(base, adapter), atol=1e-4, rtol=1e-4)


def test_qlora_is_merged_into_the_16_bit_base_as_training_saw_it(run, material):
    """Linear layers: the NF4 values that training saw, and LoRA on top. The head, which
    bitsandbytes leaves alone: the base's, also where Axolotl 0.19 rounds it."""
    import bitsandbytes.functional as bnb

    base, adapter = material("sharded")
    merged = merge_lora(run("sharded", load_in_4bit=True))
    held, original = {}, {}
    for folder, into in ((merged, held), (base, original)):
        for shard in folder.glob("*.safetensors"):
            into.update(load_file(shard))
    trained = load_file(adapter / ADAPTER_FILE)
    name = "model.layers.1.self_attn.q_proj"
    quantized, state = bnb.quantize_4bit(
        original[f"{name}.weight"], quant_type="nf4", compress_statistics=True
    )
    seen = bnb.dequantize_4bit(quantized, state, quant_type="nf4")
    a, b = (trained[f"{PREFIX}{name}.lora_{each}.weight"] for each in "AB")
    torch.testing.assert_close(held[f"{name}.weight"], seen + b @ a * 2, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(seen, original[f"{name}.weight"], atol=1e-5)
    assert torch.equal(held["lm_head.weight"], original["lm_head.weight"])
    for full in ("model.embed_tokens.weight", "model.norm.weight"):
        assert torch.equal(held[full], trained[PREFIX + full])
    assert "quantization_config" not in json.loads((merged / "config.json").read_text())


# ---- refused --------------------------------------------------------------------------------


def no_adapter(out: Path, base: Path) -> None:
    (out / ADAPTER_FILE).unlink()


def no_adapter_config(out: Path, base: Path) -> None:
    (out / "adapter_config.json").unlink()


def cut_off_adapter(out: Path, base: Path) -> None:
    data = (out / ADAPTER_FILE).read_bytes()
    (out / ADAPTER_FILE).write_bytes(data[: len(data) // 2])


def lost_layer(out: Path, base: Path) -> None:
    tensors = load_file(out / ADAPTER_FILE)
    save_file(
        {name: tensor for name, tensor in tensors.items() if "layers.1." not in name},
        out / ADAPTER_FILE,
    )


def other_width(out: Path, base: Path) -> None:
    tensors = load_file(out / ADAPTER_FILE)
    save_file(
        {name: tensor.repeat_interleave(2, dim=-1) for name, tensor in tensors.items()},
        out / ADAPTER_FILE,
    )


def other_family(out: Path, base: Path) -> None:
    text = (base / "config.json").read_text()
    assert "gpt_neox" not in text
    tensors = load_file(out / ADAPTER_FILE)
    save_file(
        {name.replace("model.layers.", "gpt_neox.layers."): t for name, t in tensors.items()},
        out / ADAPTER_FILE,
    )


def cut_off_base(out: Path, base: Path) -> None:
    shard = next(base.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])


def lost_shard(out: Path, base: Path) -> None:
    sorted(base.glob("*.safetensors"))[-1].unlink()


def no_base_config(out: Path, base: Path) -> None:
    (base / "config.json").unlink()


def quantized_base(out: Path, base: Path, **quantization: object) -> None:
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "bitsandbytes",
        "load_in_8bit": True,
        **quantization,
    }
    (base / "config.json").write_text(json.dumps(config))


REFUSED = {
    no_adapter: "nothing to merge: .*out holds no adapter: it has no adapter_model.safetensors",
    no_adapter_config: "holds no adapter: it has no adapter_config.json",
    cut_off_adapter: "holds no adapter: its adapter_model.safetensors is cut off or damaged",
    lost_layer: "cannot be merged into base_model: .*it has no model.layers.1.*It was trained on",
    other_width: "cannot be merged into base_model: .*the shape in current model is ",
    other_family: "cannot be merged into base_model: ",
    cut_off_base: "base: model.* is cut off or damaged",
    lost_shard: "base is incomplete: model.safetensors.index.json names ",
    no_base_config: "base_model: cannot read the config of ",
    quantized_base: "cannot merge into a quantized base: .* is stored in bitsandbytes 8-bit. "
    "Write base_model: <the 16-bit model",
}


@pytest.mark.parametrize("spoil", REFUSED, ids=lambda spoil: spoil.__name__)
def test_merge_is_refused_by_name_and_an_earlier_one_stays(tmp_path, run, material, spoil):
    base = tmp_path / "base"
    shutil.copytree(material("sharded")[0], base)
    recipe = run("sharded", base_model=str(base))
    earlier = tmp_path / "out" / "merged"
    earlier.mkdir()
    (earlier / stored.WHOLE).write_bytes(b"an earlier merge")
    spoil(tmp_path / "out", base)
    before = contents(earlier), contents(tmp_path / "out").keys() | {"debug.log"}
    with pytest.raises(ValueError, match=f"(?s){REFUSED[spoil]}"):
        merge_lora(recipe)
    after = contents(earlier), contents(tmp_path / "out").keys() | {"debug.log"}
    assert after == before


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_bases_of_other_quantizations_are_refused(tmp_path, run, material, method):
    base = tmp_path / "base"
    shutil.copytree(material("tied")[0], base)
    quantized_base(tmp_path, base, quant_method=method, bits=4, load_in_8bit=False)
    with pytest.raises(ValueError, match=f"is stored in {method}"):
        merge_lora(run("tied", base_model=str(base)))


def test_base_stored_in_4_bit_is_merged_where_axolotl_can_and_refused_where_not(
    tmp_path, run, material
):
    from transformers import BitsAndBytesConfig

    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(
        material("sharded")[0],
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        dtype=torch.float32,
    ).save_pretrained(base)
    AutoTokenizer.from_pretrained(material("sharded")[0]).save_pretrained(base)
    recipe = run("sharded", base_model=str(base))
    with pytest.raises(ValueError, match="is stored in bitsandbytes 4-bit"):
        merge_lora(recipe, merge_method="legacy")
    if not compat.HAS_MERGE_HOOK:
        with pytest.raises(ValueError, match="is stored in bitsandbytes 4-bit"):
            merge_lora(recipe)
        return
    merged = merge_lora(recipe)
    assert "quantization_config" not in json.loads((merged / "config.json").read_text())
    expected = AutoModelForCausalLM.from_pretrained(
        base, config=scaled(base), dtype=torch.float32, device_map="cpu"
    )
    expected = logits_of(PeftModel.from_pretrained(expected, tmp_path / "out"))
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    # Axolotl writes the dequantized weights in bf16.
    torch.testing.assert_close(logits_of(model), expected, atol=0.05, rtol=0.05)


def test_full_fine_tune_has_nothing_to_merge(run):
    recipe = run("tied", adapter=None, longlora={"rope": "linear"})
    with pytest.raises(ValueError, match=r"this recipe has no adapter: .*nothing to merge"):
        merge_lora(recipe)


def test_killed_run_names_its_last_checkpoint_and_that_merges(run, tmp_path, material):
    recipe = run("tied")
    out = tmp_path / "out"
    for step in (2, 4, 6):
        shutil.copytree(material("tied")[1], out / f"checkpoint-{step}")
    no_adapter(out, out)
    no_adapter(out / "checkpoint-6", out)
    with pytest.raises(ValueError, match=r"lora_model_dir: .*checkpoint-4"):
        merge_lora(recipe)
    merged = merge_lora(recipe, lora_model_dir=str(out / "checkpoint-4"))
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    torch.testing.assert_close(
        logits_of(model), stock_logits(*material("tied")), atol=1e-4, rtol=1e-4
    )


def test_half_written_checkpoint_does_not_stop_a_merge(run, tmp_path):
    recipe = run("tied")
    broken = tmp_path / "out" / "checkpoint-3"
    broken.mkdir()
    (broken / ADAPTER_FILE).write_bytes(b"cut")
    assert (merge_lora(recipe) / "config.json").is_file()

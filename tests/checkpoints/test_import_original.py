"""Import of the original project's checkpoints: same logits as applying the tensors by hand."""

from __future__ import annotations

import json
import os

import pytest
import torch
from click.testing import CliRunner
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from longlora_plugin.checkpoints.import_original import import_checkpoint
from longlora_plugin.cli import longlora
from longlora_plugin.merge.folder import Source, merge

CONTEXT = 256  # × 4
R, ALPHA = 4, 8


@pytest.fixture(scope="module")
def original(tmp_path_factory, tiny_model_dir):
    """A checkpoint as the original scripts wrote it, and the logits of its model."""
    base = tiny_model_dir("plain")
    config = AutoConfig.from_pretrained(base)
    config.rope_parameters = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    config.max_position_embeddings = CONTEXT
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, config=config, dtype=torch.float32),
        LoraConfig(
            r=R,
            lora_alpha=ALPHA,
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
            task_type="CAUSAL_LM",
        ),
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "embed" in name or "norm" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    tokens = torch.arange(3, 203)[None]
    with torch.no_grad():
        logits = model.eval()(tokens).logits
    folder = tmp_path_factory.mktemp("original")
    whole = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapter_config = {
        "base_model_name_or_path": str(base),
        "r": R,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "task_type": "CAUSAL_LM",
        "peft_type": "LORA",
    }
    return folder, base, whole, adapter_config, tokens, logits


def write_split(folder, whole, adapter_config):
    """What `get_trainable_weights.py` of the original made of the whole state."""
    lora = {k.replace("default.", ""): v for k, v in whole.items() if "lora" in k}
    trained = {
        k[len("base_model.model.") :]: v
        for k, v in whole.items()
        if "lora" not in k and ("embed" in k or "norm" in k)
    }
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(lora, folder / "adapter_model.bin")
    torch.save(trained, folder / "trainable_params.bin")
    (folder / "adapter_config.json").write_text(json.dumps(adapter_config))


def load_stock(base, folder):
    config = AutoConfig.from_pretrained(folder)
    assert config.max_position_embeddings == CONTEXT
    model = AutoModelForCausalLM.from_pretrained(base, config=config, dtype=torch.float32)
    return PeftModel.from_pretrained(model, folder).eval()


def in_safetensors(source):
    for path in source.glob("*.bin"):
        tensors = {name: tensor.clone() for name, tensor in torch.load(path).items()}
        save_file(tensors, path.with_suffix(".safetensors"))
        path.unlink()


def in_shards(source):
    path = source / "pytorch_model.bin"
    tensors = list(torch.load(path).items())
    for number, part in enumerate((tensors[::2], tensors[1::2]), start=1):
        torch.save(dict(part), source / f"pytorch_model-{number:05}-of-00002.bin")
    path.unlink()


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("change", [None, in_safetensors, in_shards])
@pytest.mark.parametrize("layout", ["split", "whole"])
def test_imported_adapter_has_the_logits_of_the_original(
    tmp_path, original, layout, change, prefix, narrow
):
    _, base, whole, adapter_config, tokens, logits = original
    source, target = tmp_path / "source", tmp_path / "target"
    if narrow:  # older than the training that followed it
        adapter_config = {
            **adapter_config,
            "target_modules": ["q_proj"],
            "layers_to_transform": [0],
        }
    if layout == "split":
        write_split(source, whole, adapter_config)
    else:
        source.mkdir()
        torch.save(whole, source / "pytorch_model.bin")
        (source / "adapter_config.json").write_text(json.dumps(adapter_config))
    for path in source.glob("*.bin"):
        torch.save({prefix + name: tensor for name, tensor in torch.load(path).items()}, path)
    if change is in_shards and layout == "split":
        pytest.skip("the parts of a split checkpoint are not in shards")
    if change:
        change(source)
    done = import_checkpoint(source, target, context=CONTEXT)
    assert (done.lora, done.trained, done.notes) == (16, 6, ())
    with torch.no_grad():
        again = load_stock(base, target)(tokens).logits
    assert torch.equal(again, logits)
    assert not list(target.glob("*.bin"))


def test_context_is_read_from_the_released_models_names(tmp_path, original):
    _, _, whole, adapter_config, *_ = original
    source = tmp_path / "Llama-2-7b-longlora-8k-ft"
    write_split(source, whole, adapter_config)
    assert import_checkpoint(source, tmp_path / "target").context == 8192


@pytest.mark.parametrize(
    ("maximum", "scaling", "context"),
    [
        (4096, {"rope_scaling": {"type": "linear", "factor": 8.0}}, 32768),
        (4096, {"rope_scaling": {"type": "linear", "factor": 2.0}}, 8192),
        (32768, {"rope_scaling": {"type": "linear", "factor": 8.0}}, 32768),
        (32768, {"rope_parameters": {"rope_type": "linear", "factor": 8.0}}, 32768),
        (4096, {}, None),
    ],
)
def test_context_is_read_from_a_config_with_the_bases_maximum_or_the_raised_one(
    tmp_path, original, maximum, scaling, context
):
    _, _, whole, adapter_config, *_ = original
    write_split(tmp_path / "source", whole, adapter_config)
    config = {"model_type": "llama", "max_position_embeddings": maximum, **scaling}
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    assert import_checkpoint(tmp_path / "source", tmp_path / "target").context == context


def test_unknown_context_is_said_and_writes_no_config(tmp_path, original):
    _, _, whole, adapter_config, *_ = original
    write_split(tmp_path / "source", whole, adapter_config)
    result = CliRunner().invoke(
        longlora, ["import", str(tmp_path / "source"), str(tmp_path / "target")]
    )
    assert result.exit_code == 0, result.output
    assert "--context TOKENS" in result.output.replace("\n", " ")
    assert not (tmp_path / "target" / "config.json").exists()
    assert (tmp_path / "target" / "adapter_model.safetensors").exists()


def test_lost_shard_is_named(tmp_path, original):
    _, _, whole, *_ = original
    torch.save(whole, tmp_path / "pytorch_model.bin")
    in_shards(tmp_path)
    (tmp_path / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(ValueError, match="holds 1 of 2 shards of pytorch_model"):
        import_checkpoint(tmp_path, tmp_path / "target", context=CONTEXT)


def test_one_added_pad_row_is_merged_with_the_mean_of_the_heads_rows(tmp_path, original):
    """As the original began with it: its head was never trained."""
    _, base, whole, adapter_config, *_ = original
    name = "base_model.model.model.embed_tokens.weight"
    row = torch.randn(1, whole[name].shape[1], generator=torch.Generator().manual_seed(2))
    write_split(tmp_path / "source", {**whole, name: torch.cat([whole[name], row])}, adapter_config)
    result = CliRunner().invoke(
        longlora,
        ["import", str(tmp_path / "source"), str(tmp_path / "out"), "--context", str(CONTEXT)],
    )
    assert result.exit_code == 0, result.output
    _, notes = merge(
        Source(tmp_path / "out", base, AutoConfig.from_pretrained(base)), tmp_path / "merged"
    )
    assert any("so they are the mean of the others" in note for note in notes)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    head = whole["base_model.model.lm_head.weight"]
    torch.testing.assert_close(
        model.lm_head.weight, torch.cat([head, head.mean(dim=0, keepdim=True)])
    )
    assert torch.equal(model.model.embed_tokens.weight[-1:], row)


def test_import_that_does_not_load_is_no_adapter(tmp_path, original):
    _, _, whole, adapter_config, *_ = original
    lost = {name: each for name, each in whole.items() if "layers.1.self_attn.k_proj" not in name}
    other = {name.replace("layers.1", "layers.7"): each for name, each in lost.items()}
    write_split(tmp_path / "source", other, adapter_config)
    result = CliRunner().invoke(
        longlora,
        ["import", str(tmp_path / "source"), str(tmp_path / "out"), "--context", str(CONTEXT)],
    )
    assert result.exit_code != 0
    assert "it has no model.layers.1" in str(result.output) + str(result.exception)
    assert not (tmp_path / "out" / "adapter_config.json").exists()


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("/tmp/longlora-malicious",)


def test_pickle_that_runs_code_is_refused(tmp_path, original):
    _, _, whole, adapter_config, *_ = original
    source = tmp_path / "source"
    write_split(source, whole, adapter_config)
    torch.save({"model.norm.weight": Malicious()}, source / "trainable_params.bin")
    with pytest.raises(ValueError, match=r"trainable_params.bin was refused"):
        import_checkpoint(source, tmp_path / "target", context=CONTEXT)
    assert not os.path.exists("/tmp/longlora-malicious")
    assert not (tmp_path / "target").exists()


def break_(source, how):
    if how == "empty":
        for file in source.iterdir():
            file.unlink()
    elif how == "truncated":
        data = (source / "adapter_model.bin").read_bytes()
        (source / "adapter_model.bin").write_bytes(data[: len(data) // 2])
    elif how == "no trained":
        (source / "trainable_params.bin").unlink()
    elif how == "rank":
        config = json.loads((source / "adapter_config.json").read_text())
        (source / "adapter_config.json").write_text(json.dumps({**config, "r": 16}))
    elif how == "not tensors":
        torch.save({"a": 1}, source / "adapter_model.bin")


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("empty", "holds no LongLoRA checkpoint"),
        ("truncated", "damaged or cut off"),
        ("no trained", "trained embeddings and norms are missing"),
        ("rank", "adapter_config.json says 16"),
        ("not tensors", "not a mapping from names to tensors"),
    ],
)
def test_broken_checkpoint_is_refused_and_nothing_is_written(tmp_path, original, how, says):
    _, _, whole, adapter_config, *_ = original
    write_split(tmp_path / "source", whole, adapter_config)
    break_(tmp_path / "source", how)
    with pytest.raises(ValueError, match=says):
        import_checkpoint(tmp_path / "source", tmp_path / "target", context=CONTEXT)
    assert not (tmp_path / "target").exists()


def test_checkpoint_of_another_base_is_refused(tmp_path, original, tiny_model_dir):
    _, _, whole, adapter_config, *_ = original
    write_split(tmp_path / "source", whole, adapter_config)
    wide = tiny_model_dir("wide", hidden_size=128)
    with pytest.raises(ValueError, match="another base model"):
        import_checkpoint(
            tmp_path / "source", tmp_path / "target", base_model=str(wide), context=CONTEXT
        )


def test_existing_adapter_is_not_overwritten(tmp_path, original):
    _, _, whole, adapter_config, *_ = original
    write_split(tmp_path / "source", whole, adapter_config)
    import_checkpoint(tmp_path / "source", tmp_path / "target", context=CONTEXT)
    with pytest.raises(ValueError, match="already holds an adapter"):
        import_checkpoint(tmp_path / "source", tmp_path / "target", context=CONTEXT)

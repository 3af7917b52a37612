"""Which models `eval` finds for a recipe, how they are built, and what is refused."""

import json
import math
import shutil
from functools import partial

import command
import pytest
import torch
from click.testing import CliRunner
from command import done
from evaluation_models import TARGET, YARN, extended, own_perplexity, write_adapter, write_recipe
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoTokenizer,
    BitsAndBytesConfig,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from longlora_plugin.artifacts.load import load_model
from longlora_plugin.cli import longlora
from longlora_plugin.evaluation.models import model_sources
from longlora_plugin.run.recipe import read_recipe

run, refused = partial(done, "eval"), partial(command.refused, "eval")


def test_adapter_row_only_where_one_was_trained(work):
    out = work / "untrained.json"
    run(work / "untrained.yml", "--data", work / "data.txt", "--lengths", 64, "--json", out)
    assert [row["model"] for row in json.loads(out.read_text())] == ["base", "base+rope"]
    given = work / "given.json"
    run(work / "untrained.yml", "--data", work / "data.txt", "--lengths", 64, "--json", given,
        "--adapter", work / "out", "--model", "adapter")  # fmt: skip
    assert [row["model"] for row in json.loads(given.read_text())] == ["adapter"]


def test_rope_none_has_no_row_of_its_own(work, tmp_path):
    recipe = write_recipe(
        tmp_path / "r.yml", work / "base", work / "out", longlora={"rope": "none"}
    )
    labels = [source.label for source in model_sources(read_recipe(recipe))]
    assert labels == ["base", "adapter"]


def test_full_fine_tune_is_evaluated_as_trained_with_its_own_config(work, tmp_path):
    output = tmp_path / "full"
    extended(work / "base").save_pretrained(output)
    recipe = write_recipe(tmp_path / "r.yml", work / "base", output, adapter=None)
    base, rope, trained = model_sources(read_recipe(recipe))
    assert (base.label, rope.label, trained.label) == ("base", "base+rope", "trained")
    assert trained.rope == YARN
    ids = torch.arange(3, 90)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            trained.load("cpu", torch.float32).model(ids).logits,
            rope.load("cpu", torch.float32).model(ids).logits,
        )


def test_merged_model_and_any_folder_can_be_named(work, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(work / "out", output)
    extended(work / "base").save_pretrained(output / "merged")
    recipe = read_recipe(write_recipe(tmp_path / "r.yml", work / "base", output))
    sources = model_sources(recipe, ["merged", f"mine={output}", f"other={work / 'base'}"])
    assert [source.label for source in sources] == ["merged", "mine", "other"]
    assert [source.adapter for source in sources] == [None, output, None]
    assert sources[0].rope == sources[1].rope == YARN
    assert sources[2].rope["rope_type"] == "default"


def test_adapter_with_added_tokens_loads(work, tmp_path):
    base = LlamaForCausalLM.from_pretrained(work / "base")
    base.resize_token_embeddings(base.config.vocab_size + 3, mean_resizing=False)
    base.save_pretrained(tmp_path / "larger")
    write_adapter(tmp_path / "larger", tmp_path / "out")
    recipe = write_recipe(tmp_path / "r.yml", work / "base", tmp_path / "out")
    source = model_sources(read_recipe(recipe), ["adapter"])[0]
    model = source.load("cpu", torch.float32).model
    assert model.get_input_embeddings().weight.shape[0] == base.config.vocab_size


def test_adapter_trained_with_another_rope_is_noted(work, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(work / "out", output)
    arguments = ["--data", work / "data.txt", "--lengths", 64, "--model", "adapter"]
    recipe = write_recipe(tmp_path / "r.yml", work / "base", output)
    extended(work / "base").config.save_pretrained(output)
    assert "was trained with" not in run(recipe, *arguments).output
    other = extended(work / "base").config
    other.rope_parameters = {**YARN, "factor": 2.0 * YARN["factor"]}
    other.save_pretrained(output)
    printed = run(recipe, *arguments).output
    assert "note: adapter: rope_parameters: the run was trained with" in printed
    source = model_sources(read_recipe(recipe), ["adapter"])[0]
    assert source.rope["factor"] == 2 * YARN["factor"]  # what was trained is measured


def test_one_name_for_two_models_is_refused_and_a_name_given_twice_is_one(work):
    arguments = [work / "recipe.yml", "--data", work / "data.txt", "--lengths", 64]
    message = refused(*arguments, "--model", f"base={work / 'out'}", "--model", "base")
    assert "two models are called 'base'" in " ".join(message.split())
    out = work / "twice.json"
    run(*arguments, "--model", "base,adapter", "--model", "base", "--json", out)
    assert [row["model"] for row in json.loads(out.read_text())] == ["base", "adapter"]


@pytest.mark.parametrize("base", ["~/models/none", "nobody/nothing", "/nowhere/at/all"])
def test_unreachable_base_model_is_one_clear_error(work, tmp_path, base):
    recipe = write_recipe(tmp_path / "r.yml", base, work / "out")
    for name in ("eval", "passkey"):
        result = command.invoke(name, recipe, "--lengths", "64")
        assert result.exit_code == 1
        assert isinstance(result.exception, SystemExit)
        said = (
            f"base_model: cannot read the config of '{base}'",
            f"base_model: the folder {base} does not exist",
            "Axolotl does not expand ~",
        )
        assert any(words in result.output for words in said)


def test_length_that_is_no_number_is_one_clear_error(work, tmp_path):
    recipe = tmp_path / "r.yml"
    for given in (".inf", ".nan", "long"):
        recipe.write_text(f"base_model: {work / 'base'}\nsequence_len: {given}\n")
        assert "write a whole number of tokens" in " ".join(refused(recipe).split())


def test_cut_off_adapter_config_is_one_clear_error(work, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(work / "out", output)
    config = output / "adapter_config.json"
    config.write_text(config.read_text()[:100])
    recipe = write_recipe(tmp_path / "r.yml", work / "base", output)
    message = refused(recipe, "--data", work / "data.txt", "--lengths", 64)
    assert "adapter_config.json is not valid JSON" in " ".join(message.split())


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("model.safetensors", "cut", "cannot load"),
        ("tokenizer_config.json", "[]", "cannot read a tokenizer"),
        ("config.json", "[]", "cannot read the config"),
    ],
)
def test_damaged_file_of_the_base_is_one_clear_error(work, tmp_path, file, content, says):
    base = tmp_path / "base"
    shutil.copytree(work / "base", base)
    (base / file).write_text(content)
    recipe = write_recipe(tmp_path / "r.yml", base, tmp_path / "out")
    options = ("--data", work / "data.txt", "--lengths", 64, "--model", "base")
    assert says in " ".join(refused(recipe, *options).split())


def test_reward_model_is_refused(work, tmp_path):
    recipe = write_recipe(tmp_path / "r.yml", work / "base", work / "out", reward_model=True)
    assert "trains a reward model" in " ".join(refused(recipe, "--lengths", 64).split())
    config = LlamaConfig.from_pretrained(work / "base")
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "reward")
    message = refused(work / "recipe.yml", "--data", work / "data.txt", "--lengths", 64,
                      "--model", f"mine={tmp_path / 'reward'}")  # fmt: skip
    assert "is no language model" in " ".join(message.split())


def test_reward_adapter_is_refused(work, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(work / "out", output)
    config = output / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "task_type": "SEQ_CLS"}))
    recipe = write_recipe(tmp_path / "r.yml", work / "base", output)
    message = refused(recipe, "--data", work / "data.txt", "--lengths", 64)
    assert "is no language model (SEQ_CLS)" in " ".join(message.split())


@pytest.fixture(scope="module")
def with_added_tokens(work, tmp_path_factory):
    """A run that added tokens for words of the text, and saved its tokenizer as Axolotl does."""
    folder = tmp_path_factory.mktemp("added")
    tokenizer = AutoTokenizer.from_pretrained(work / "base")
    tokenizer.add_tokens(["boats", "bells", "under"])
    base = LlamaForCausalLM.from_pretrained(work / "base")
    base.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    base.save_pretrained(folder / "larger")
    write_adapter(folder / "larger", folder / "out")
    tokenizer.save_pretrained(folder / "out")
    write_recipe(folder / "r.yml", work / "base", folder / "out")
    return folder


def test_tokens_that_the_run_added_are_read_as_one_by_its_adapter(work, with_added_tokens):
    folder = with_added_tokens
    out = folder / "rows.json"
    result = run(folder / "r.yml", "--data", work / "data.txt", "--lengths", 64, "--json", out)
    rows = {row["model"]: row for row in json.loads(out.read_text())}
    text = (work / "data.txt").read_text()
    models = {
        "base": (work / "base", LlamaForCausalLM.from_pretrained(work / "base").eval()),
        "adapter": (
            folder / "out",
            PeftModel.from_pretrained(extended(folder / "larger"), folder / "out").eval(),
        ),
    }
    for name, (tokenizer, model) in models.items():
        ids = torch.tensor([AutoTokenizer.from_pretrained(tokenizer)(text)["input_ids"]])
        nats = math.log(own_perplexity(model, ids, 64, 32)) * (ids.shape[1] - 1)
        assert rows[name]["tokens"] == ids.shape[1] - 1
        assert rows[name]["nll_per_character"] == pytest.approx(nats / len(text), rel=1e-4)
        bits = nats / math.log(2) / len(text.encode())
        assert rows[name]["bits_per_byte"] == pytest.approx(bits, rel=1e-4)
        assert f"{bits:.4f}" in result.output
    assert rows["adapter"]["tokens"] != rows["base"]["tokens"]
    assert "Bits per byte" in result.output


def test_token_file_of_two_tokenizers_is_refused(work, with_added_tokens):
    message = refused(with_added_tokens / "r.yml", "--data", work / "data.txt", "--lengths", 64,
                      "--tokens", with_added_tokens / "t.safetensors")  # fmt: skip
    assert "the models have different tokenizers" in " ".join(message.split())


def test_tokenizer_with_more_tokens_than_embeddings_is_refused(work, with_added_tokens, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(work / "out", output)
    AutoTokenizer.from_pretrained(with_added_tokens / "out").save_pretrained(output)
    recipe = write_recipe(tmp_path / "r.yml", work / "base", output)
    message = refused(recipe, "--data", work / "data.txt", "--lengths", 64)
    assert "the tokenizer is not the model's" in " ".join(message.split())


def test_quantized_base_of_the_recipe_is_loaded_quantized(work, tmp_path):
    torch.manual_seed(0)
    wide = LlamaConfig.from_pretrained(work / "base", hidden_size=64, intermediate_size=64)
    wide.head_dim = 16
    LlamaForCausalLM(wide).save_pretrained(tmp_path / "base")  # a block of NF4 has 64 values
    AutoTokenizer.from_pretrained(work / "base").save_pretrained(tmp_path / "base")
    write_adapter(tmp_path / "base", tmp_path / "out")
    recipe = write_recipe(
        tmp_path / "r.yml", tmp_path / "base", tmp_path / "out", load_in_4bit=True
    )
    ids = torch.arange(3, 60)[None]
    adapter = model_sources(read_recipe(recipe), ["adapter"])[0]
    loaded = adapter.load("cpu", torch.float32)
    config = LlamaConfig.from_pretrained(tmp_path / "base")
    config.rope_parameters, config.max_position_embeddings = YARN, TARGET
    reference = LlamaForCausalLM.from_pretrained(
        tmp_path / "base",
        config=config,
        dtype=torch.float32,
        device_map={"": "cpu"},
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        ),
    )
    reference = PeftModel.from_pretrained(reference, tmp_path / "out").eval()
    whole = model_sources(read_recipe(recipe), ["adapter"], unquantized=True)[0]
    with torch.no_grad():
        expected, found = reference(ids).logits, loaded.model(ids).logits
        full = whole.load("cpu", torch.float32).model(ids).logits
    torch.testing.assert_close(found, expected)
    assert (full - found).abs().max() > 0.05
    assert adapter.description()["quantized_bits"] == 4
    assert adapter.identity() != whole.identity()


def test_device_map_of_the_recipe_or_the_command_places_the_model(work, tmp_path):
    recipe = read_recipe(write_recipe(tmp_path / "r.yml", work / "base", work / "out"))
    (source,) = model_sources(recipe, ["base"], device_map="cpu")
    assert source.load("cuda:7", torch.float32).device == torch.device("cpu")
    mapped = write_recipe(tmp_path / "m.yml", work / "base", work / "out", device_map="cpu")
    (source,) = model_sources(read_recipe(mapped), ["base"])
    assert source.load("cuda:7", torch.float32).device == torch.device("cpu")


def test_family_without_pytorchs_attention_is_measured(work, tmp_path):
    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=len(AutoTokenizer.from_pretrained(work / "base")),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_local_experts=2,
        num_experts_per_tok=1,
        sliding_window=32,
    )
    GptOssForCausalLM(config).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(work / "base").save_pretrained(tmp_path / "base")
    recipe = write_recipe(
        tmp_path / "r.yml", tmp_path / "base", tmp_path / "out", adapter=None, sequence_len=64
    )
    out = tmp_path / "rows.json"
    run(recipe, "--data", work / "data.txt", "--lengths", 64, "--model", "base", "--json", out)
    (row,) = json.loads(out.read_text())
    ids = torch.tensor(
        [AutoTokenizer.from_pretrained(work / "base")((work / "data.txt").read_text())["input_ids"]]
    )
    model = GptOssForCausalLM.from_pretrained(tmp_path / "base").eval()
    assert row["perplexity"] == pytest.approx(own_perplexity(model, ids, 64, 32), rel=1e-4)
    asked = CliRunner().invoke(
        longlora, ["passkey", str(recipe), "--lengths", "300", "--trials", "2", "--depths", "0"]
    )
    assert asked.exit_code == 0, asked.output


def test_adapter_in_the_old_file_format_is_found_with_the_rows_it_added(work, tmp_path):
    base = LlamaForCausalLM.from_pretrained(work / "base")
    base.resize_token_embeddings(base.config.vocab_size + 3, mean_resizing=False)
    base.save_pretrained(tmp_path / "larger")
    write_adapter(tmp_path / "larger", tmp_path / "out")
    extended(work / "base").config.save_pretrained(tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    recipe = write_recipe(tmp_path / "r.yml", work / "base", tmp_path / "out")
    tokens = torch.arange(3, 103)[None]
    with torch.no_grad():
        expected = model_sources(read_recipe(recipe), ["adapter"])[0].load("cpu", torch.float32)
        expected = expected.model(tokens).logits
        torch.save(tensors, tmp_path / "out" / "adapter_model.bin")
        (tmp_path / "out" / "adapter_model.safetensors").unlink()
        found = model_sources(read_recipe(recipe), ["adapter"])[0].load("cpu", torch.float32)
        torch.testing.assert_close(found.model(tokens).logits, expected)
        torch.testing.assert_close(load_model(tmp_path / "out")(tokens).logits, expected)

"""From a LongLoRA recipe to Axolotl's: what is written, and what is refused before loading."""

from __future__ import annotations

import copy
import re

import pytest
from transformers import (
    BloomConfig,
    FalconConfig,
    Gemma3Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
)

from longlora_plugin.run.base_model import base_config_of
from longlora_plugin.run.manifest import manifest_of
from longlora_plugin.run.prepare import prepare_run
from longlora_plugin.run.recipe import asks_for_longlora, read_recipe
from longlora_plugin.run.summary import rope_facts


def llama(**overrides):
    return LlamaConfig(**{"max_position_embeddings": 4096, **overrides})


def recipe(**overrides):
    return {
        "base_model": "org/base",
        "adapter": "longlora",
        "sequence_len": 32768,
        **overrides,
    }


def prepared(raw, config=None):
    return prepare_run(raw, config or llama()).checked()


def written(raw, config=None):
    """The recipe as Axolotl gets it."""
    return {**raw, **prepared(raw, config).updates}


def test_two_lines_become_the_recommended_recipe():
    result = written(recipe())
    assert result["adapter"] == "lora"
    assert (result["lora_r"], result["lora_alpha"], result["lora_dropout"]) == (8, 16, 0.0)
    assert result["lora_target_modules"] == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert result["model_config"]["max_position_embeddings"] == 32768
    assert result["model_config"]["rope_parameters"] == {
        "rope_type": "yarn",
        "factor": 8.0,
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
    }
    assert prepared(recipe()).rope.chosen_by_auto
    assert prepared(recipe()).group_size == 8192


def test_four_bit_base_becomes_qlora_and_eight_bit_lora():
    assert written(recipe(load_in_4bit=True))["adapter"] == "qlora"
    assert written(recipe(load_in_8bit=True))["adapter"] == "lora"


def test_the_recipes_own_lora_settings_win():
    raw = recipe(lora_r=64, lora_alpha=32, lora_dropout=0.1, lora_target_linear=True)
    result = written(raw)
    assert (result["lora_r"], result["lora_alpha"], result["lora_dropout"]) == (64, 32, 0.1)
    assert "lora_target_modules" not in result


@pytest.mark.parametrize("adapter", ["lora", "qlora", None])
def test_a_block_with_another_adapter_leaves_the_adapter_alone(adapter):
    result = written(recipe(adapter=adapter, longlora={}))
    assert result["adapter"] == adapter
    assert "lora_r" not in result
    run = prepared(recipe(adapter=adapter, longlora={}))
    assert (run.adapter, run.trainable) == (adapter, ())


def test_recipe_without_our_keys_does_not_ask():
    assert not asks_for_longlora({"adapter": "lora", "base_model": "x"})
    assert not asks_for_longlora({"base_model": "x"})
    assert asks_for_longlora({"longlora": None})
    assert asks_for_longlora({"adapter": "longlora"})


def test_neither_recipe_nor_base_config_is_changed():
    raw, config = recipe(model_config={"attention_bias": False}), llama()
    before = copy.deepcopy(raw), config.to_dict()
    prepare_run(raw, config)
    assert (raw, config.to_dict()) == before


def test_other_model_config_overrides_are_kept():
    result = written(recipe(model_config={"sliding_window": None}))
    assert result["model_config"]["sliding_window"] is None
    assert result["model_config"]["rope_parameters"]["rope_type"] == "yarn"


def test_rope_none_leaves_model_config_alone():
    assert "model_config" not in written(recipe(longlora={"rope": "none"}))


def test_the_recipes_own_rope_with_ours_off_is_accepted():
    own = {"rope_parameters": {"rope_type": "yarn", "factor": 8.0, "rope_theta": 1e4}}
    result = written(recipe(model_config=own, longlora={"rope": "none"}))
    assert result["model_config"] == own


@pytest.mark.parametrize(
    "own",
    [
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "max_position_embeddings": 8192},
    ],
    ids=["rope_parameters", "rope_scaling"],
)
def test_a_recipes_own_rope_is_what_the_run_says_it_trains_with(own):
    run = prepared(recipe(model_config=own, longlora={"rope": "none"}))
    linear = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    assert manifest_of(run).rope_parameters == linear
    assert "'rope_type': 'linear'" in next(rope_facts(run)).why
    assert run.base_context == 4096


def test_no_extension_is_a_warning_and_shifted_attention_stays():
    run = prepared(recipe(sequence_len=2048))
    assert "2048 is not above the 4096 tokens" in run.warnings[0]
    assert "S²-Attn still runs" in run.warnings[0]
    assert "model_config" not in run.updates
    assert (run.model_config, run.rope_fields) == ({}, {})
    assert run.group_size == 512


def test_missing_sequence_len_is_axolotls_default():
    assert prepared({"base_model": "x", "adapter": "longlora"}).target_context == 512


@pytest.mark.parametrize(
    ("raw", "config", "says"),
    [
        (recipe(longlora={"group_sise": 8}), llama(), ["group_sise", "group_size"]),
        (
            recipe(longlora={"group_size": 8, "group_size_ratio": 0.5}),
            llama(),
            ["two answers", "keep one"],
        ),
        (recipe(longlora={"group_size": 9}), llama(), ["even"]),
        (
            recipe(sequence_len=64, longlora={"group_size": 128}),
            llama(max_position_embeddings=32),
            ["larger than sequence_len", "128"],
        ),
        (recipe(longlora={"rope": "liner"}), llama(), ["liner", "linear"]),
        (recipe(longlora={"rope": {"preset": "yarn", "fctor": 2}}), llama(), ["fctor", "factor"]),
        (recipe(longlora={"trainable": ["norm"]}), llama(), ["'norm'", "norms"]),
        (recipe(longlora={"attention_pattern": "s3"}), llama(), ["s3", "s2"]),
        (recipe(longlora={"rope": "none"}), BloomConfig(), ["org/base", "attention interface"]),
        (recipe(), GPT2Config(), ["gpt2", "RoPE"]),
        (
            recipe(longlora={"rope": "none"}),
            FalconConfig(),
            ["org/base", "falcon", "attention interface"],
        ),
        (
            recipe(attn_implementation="xformers"),
            llama(),
            ["xformers", "sdpa", "flash_attention_2"],
        ),
        (recipe(sage_attention=True), llama(), ["sage"]),
        (recipe(context_parallel_size=2, rl="dpo"), llama(), ["context_parallel_size: 2", "dpo"]),
        (recipe(tiled_mlp=True, fsdp_config={"x": 1}), llama(), ["fsdp_config: in", "zero3.json"]),
        (recipe(tiled_mlp=True, micro_batch_size=2), llama(), ["tiled_mlp: true", "size: 1 with"]),
        (recipe(scaling_softmax=True), llama(), ["scaling_softmax: true", "evaluation only"]),
        (
            recipe(model_config={"rope_parameters": {"rope_type": "linear", "factor": 2}}),
            llama(),
            ["two answers", "longlora.rope: auto", "rope_parameters", "rope: none"],
        ),
        (recipe(sequence_len=262144), Gemma3Config(), ["multimodal", "rope: none"]),
        (
            recipe(lm_eval_tasks=["ruler", "arc_easy:5"]),
            llama(),
            ["lm_eval_tasks", "bench RECIPE --tasks ruler,arc_easy", "lm_eval_model"],
        ),
    ],
)
def test_wrong_recipe_is_refused_with_what_to_write(raw, config, says):
    with pytest.raises(ValueError, match=r".") as error:
        prepare_run(raw, config).checked()
    for part in says:
        assert part in str(error.value), str(error.value)


def test_sliding_window_families_are_judged_on_the_built_model_only():
    assert not prepare_run(recipe(), MistralConfig()).problems


@pytest.mark.parametrize("flag", ["flash_attention", "sdp_attention", "eager_attention"])
def test_legacy_attention_flags_are_understood(flag):
    assert not prepare_run(recipe(**{flag: True}), llama()).problems


def test_lm_eval_of_a_merged_model_and_of_a_full_fine_tune_is_accepted():
    tasks = {"lm_eval_tasks": ["ruler"]}
    prepare_run(recipe(**tasks, lm_eval_model="out/merged"), llama()).checked()
    prepare_run(recipe(**tasks, adapter=None, longlora={}), llama()).checked()


def test_trainable_as_a_word_says_how_to_write_the_list():
    (problem,) = prepare_run(recipe(longlora={"trainable": "embeddings"}), llama()).problems
    assert "write trainable: [embeddings]" in problem


@pytest.mark.parametrize(
    "path", ["/nowhere/model", "./nowhere", "models/of/mine", r"C:\models\mine", "my model", "a:b"]
)
def test_a_path_that_is_no_folder_is_said_to_be_missing(path):
    with pytest.raises(ValueError, match=re.escape(f"the folder {path} does not exist")):
        base_config_of({"base_model": path})


@pytest.mark.parametrize(
    "own", [{"sliding_window": "4096"}, {"num_hidden_layers": 10**9}, {"hidden_size": 0}], ids=str
)
def test_a_size_of_the_recipes_own_that_is_none_is_refused_by_name(own):
    (problem,) = prepare_run(recipe(model_config=own), llama()).problems
    assert f"model_config.{next(iter(own))}: got" in problem


def test_what_was_probably_meant_by_a_wrong_base_is_said(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    for given, meant in {
        tmp_path / "modle": f"did you mean {tmp_path / 'model'}?",
        tmp_path / "model" / "config.json": f"is a file; write its folder, {tmp_path / 'model'}",
        "https://huggingface.co/org/name/tree/main": "is an address; write org/name",
    }.items():
        with pytest.raises(ValueError, match=re.escape(meant)):
            base_config_of({"base_model": str(given)})


def test_stopping_early_before_the_steps_with_full_attention_is_a_warning():
    early = recipe(early_stopping_patience=3, longlora={"full_attention_steps": 0.1})
    assert any("before its last steps" in text for text in prepared(early).warnings)
    early["longlora"]["full_attention_steps"] = 0
    assert not any("before its last steps" in text for text in prepared(early).warnings)


# --- preference training -----------------------------------------------------------------------


@pytest.mark.parametrize("steps", [{}, {"full_attention_steps": 5}])
def test_a_precomputed_reference_leaves_no_step_with_full_attention_and_says_so(steps):
    run = prepared(recipe(rl="dpo", precompute_ref_log_probs=True, longlora=steps))
    assert run.block.full_attention_steps_of(100) == 0
    warnings = [line for line in run.warnings if "precompute_ref_log_probs" in line]
    assert len(warnings) == 1
    assert f"{steps.get('full_attention_steps', 0.1):g} becomes 0" in warnings[0]


@pytest.mark.parametrize(
    ("method", "block"),
    [
        ("dpo", {"full_attention_steps": 0}),
        ("dpo", {"shifted_attention": False}),
        # Axolotl reads precompute_ref_log_probs with dpo and ipo only.
        ("kto", {"full_attention_steps": 5}),
        (None, {"full_attention_steps": 5}),
    ],
)
def test_a_precomputed_reference_without_a_switch_is_no_warning(method, block):
    run = prepared(recipe(rl=method, precompute_ref_log_probs=True, longlora=block))
    assert not any("precompute" in line for line in run.warnings)
    assert run.block.full_attention_steps_of(100) == block.get("full_attention_steps", 10)


@pytest.mark.parametrize("adapter", ["longlora", "lora", "qlora"])
@pytest.mark.parametrize(
    ("keys", "refusal"),
    [
        ({"relora": True, "jagged_restart_steps": 50}, "relora: true does not work"),
        *(
            ({"rl": method, "lora_model_dir": "earlier"}, f"rl: {method} with lora_model_dir")
            for method in ("dpo", "ipo", "kto")
        ),
        ({"rl": "ebft"}, "rl: ebft does not work with shifted attention"),
    ],
)
def test_what_no_trainer_does_soundly_is_refused_by_name(keys, refusal, adapter):
    with pytest.raises(ValueError, match=refusal):
        prepared(recipe(adapter=adapter, longlora={}, **keys))


@pytest.mark.parametrize("method", ["dpo", "ipo", "kto", "orpo", "simpo", "grpo"])
def test_embeddings_and_norms_train_with_every_preference_method(method):
    assert prepared(recipe(rl=method)).trainable == ("embeddings", "norms")
    prepared(recipe(rl="ebft", longlora={"shifted_attention": False}))


# --- learning rates for groups of tensors --------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "rate"),
    [
        ({}, "learning_rate"),
        ({"embedding_lr": 1e-5}, "1e-05"),
        ({"embedding_lr": 1e-5, "embedding_lr_scale": 0.5}, "0.5 × learning_rate"),
    ],
)
def test_groups_of_rates_that_do_not_reach_embeddings_and_norms_are_warned_of(keys, rate):
    given = recipe(lr_groups=[{"name": "norms", "modules": ["norm"], "lr": 0.1}], **keys)
    (warning,) = prepared(given).warnings
    assert f"embeddings and norms train at {rate}; write embedding_lr" in warning
    assert not prepared({**given, "longlora": {"trainable": []}}).warnings
    assert not prepared({**given, "adapter": "lora", "longlora": {}}).warnings
    assert not prepared({**given, "lr_groups": []}).warnings


# --- values of a kind that nobody can read --------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"base_model": 3}, "base_model: got 3; write a name"),
        ({"output_dir": ["a"]}, "output_dir: got ['a']; write a name or a path"),
        ({"lora_model_dir": 3}, "lora_model_dir: got 3; write a name or a path"),
        ({"deepspeed": 3}, "deepspeed: got 3; write a name or a path or a block of keys"),
        ({"fsdp_config": "x"}, "fsdp_config: got 'x'; write a block of keys"),
        ({"attn_implementation": ["a"]}, "attn_implementation: got ['a']; write a name"),
        ({"lora_target_modules": [3]}, "lora_target_modules: got [3]; write a name or a list"),
        ({"model_config": {1: 2}}, "model_config: got {1: 2}; write a block of keys"),
        ({"model_config": {"hidden_size": "x"}}, "model_config.hidden_size: got 'x'"),
        ({"longlora": {"full_attention_steps": float("inf")}}, "full_attention_steps: got inf"),
    ],
    ids=str,
)
def test_a_value_of_another_kind_is_one_problem_by_name(keys, says):
    problems = prepare_run(recipe(**keys), llama()).problems
    assert len(problems) == 1
    assert says in problems[0]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("base_model: &a [*a]", "contains itself"),
        ("a: " + "[" * 5000, "not valid YAML"),
        ("base_model: [x]\noutput_dir: 3", r"base_model: got \['x'\].*\n.*output_dir: got 3"),
    ],
    ids=["alias", "deep", "kinds"],
)
def test_a_file_that_is_no_recipe_is_one_clear_error(tmp_path, text, says):
    (tmp_path / "recipe.yml").write_text(text)
    with pytest.raises(ValueError, match=says):
        read_recipe(tmp_path / "recipe.yml")


@pytest.mark.parametrize(
    "content",
    ["[]", "[" * 100000, '{"model_type": "llama", "num_attention_heads": 0}', "", '{"a"'],
    ids=["a list", "deep", "no heads", "empty", "cut off"],
)
def test_a_damaged_config_of_the_base_is_one_clear_error(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match="base_model: cannot read the config of"):
        base_config_of({"base_model": str(tmp_path)})

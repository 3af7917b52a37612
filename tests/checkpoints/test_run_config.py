"""What was trained counts, whatever the recipe says by now."""

from __future__ import annotations

import copy

import pytest
from transformers import LlamaConfig, MistralConfig

from longlora_plugin.checkpoints.run_config import for_base_weights, trained_config
from longlora_plugin.rope import keep_both_spellings, rope_parameters_of
from longlora_plugin.run.prepare import prepare_run

RECIPE = {"base_model": "org/base", "adapter": "longlora", "sequence_len": 8192}


@pytest.fixture
def base():
    return MistralConfig(max_position_embeddings=4096, sliding_window=16)


def prepared(base, **changes):
    block = {"rope": "linear", **changes.pop("longlora", {})}
    return prepare_run({**RECIPE, "longlora": block, **changes}, base)


@pytest.mark.parametrize(
    ("trained", "now", "differs"),
    [
        ({}, {}, set()),
        ({"model_config": {"sliding_window": None}}, {}, {"sliding_window"}),
        (
            {"sequence_len": 16384},
            {},
            {"max_position_embeddings", "rope_parameters"},
        ),
        ({"longlora": {"rope": "yarn"}}, {}, {"rope_parameters"}),
        ({"longlora": {"rope": "yarn"}}, {"longlora": {"rope": "yarn"}}, set()),
        ({"longlora": {"rope": "llama3"}}, {"longlora": {"rope": "llama3"}}, set()),
        (
            {
                "longlora": {"rope": "none"},
                "model_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 7e4}},
            },
            {"longlora": {"rope": "none"}},
            {"rope_parameters"},
        ),
    ],
    ids=[
        "the same",
        "no window",
        "longer on the command line",
        "another preset",
        "yarn",
        "llama3",
        "own RoPE",
    ],
)
def test_the_saved_config_counts_and_a_disagreement_is_told_by_name(
    base, tmp_path, trained, now, differs
):
    built = prepared(base, **trained).checked().config_of(base)
    rope_before_saving = copy.deepcopy(built)
    built.use_cache = False  # as Axolotl saves it
    built.vocab_size += 3  # tokens that the run added
    keep_both_spellings(built)
    built.save_pretrained(tmp_path)
    config, notes = trained_config(base, tmp_path, prepared(base, **now).model_config)
    assert config.vocab_size == built.vocab_size
    config = for_base_weights(config, base)
    assert {note.split(":")[0] for note in notes} == differs
    assert config.vocab_size == base.vocab_size  # the base's weights are loaded with it
    assert rope_parameters_of(config) == rope_parameters_of(rope_before_saving)
    for field in ("max_position_embeddings", "sliding_window"):
        assert getattr(config, field) == getattr(built, field)


@pytest.mark.parametrize(("token", "expected"), [(5, 5), (32001, None)])
def test_a_padding_token_that_the_run_added_has_no_row_in_the_base_yet(base, token, expected):
    trained = copy.deepcopy(base)
    trained.vocab_size, trained.pad_token_id = base.vocab_size + 3, token
    loads = for_base_weights(trained, base)
    assert (loads.vocab_size, loads.pad_token_id) == (base.vocab_size, expected)
    assert trained.pad_token_id == token


def test_without_a_saved_config_the_recipe_counts(base, tmp_path):
    run = prepared(base)
    config, notes = trained_config(base, tmp_path, run.model_config)
    assert notes == []
    assert config.to_dict() == run.config_of(base).to_dict()


def test_a_folder_of_another_model_or_a_damaged_config_is_refused(base, tmp_path):
    LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="of a llama model"):
        trained_config(base, tmp_path, {})
    (tmp_path / "config.json").write_text('{"model_')
    with pytest.raises(ValueError, match="cannot be used"):
        trained_config(base, tmp_path, {})

"""Both spellings of RoPE say the same: read by transformers 5 from either, built, saved again."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from rope_families import (
    FAMILIES,
    GEMMA3,
    ORIGINAL,
    TARGET,
    build,
    lists,
    options_for,
    rotary_of,
    tiny,
)
from transformers import AutoConfig, Gemma3Config, LlamaConfig, Olmo3Config

from longlora_plugin.rope import (
    PRESETS,
    apply_rope,
    keep_both_spellings,
    resolve_rope,
    rope_fields,
    rope_parameters_of,
    write_rope,
)

MAKERS = {name: entry[0] for name, entry in FAMILIES.items()}
MAKERS["olmo3"] = lambda: tiny(Olmo3Config, **GEMMA3)
CASES = [
    (family, preset)
    for family in MAKERS
    for preset in PRESETS
    if preset not in ("pi", "auto")
    and (family != "phi3" or preset in ("ntk", "theta", "longrope", "none"))
    and (family, preset) not in (("olmo3", "ntk"), ("olmo3", "theta"))
]


def extended(family, preset):
    config = MAKERS[family]()
    dim = FAMILIES[family][2] if family in FAMILIES else 16
    apply_rope(config, resolve_rope(preset, config, TARGET, **options_for(preset, dim)))
    return config


def saved(config, folder):
    config.save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())


def read(content, folder):
    (folder / "config.json").write_text(json.dumps(content))
    return AutoConfig.from_pretrained(folder)


def frequencies(config):
    """Every rotary buffer of a model built from it, at rest and after a long row, and the scale."""
    model = build(config)
    rotary = rotary_of(model)
    found = []
    for length in (4, TARGET):
        with torch.no_grad():
            model(torch.zeros(1, length, dtype=torch.long))
        found += [value.double().numpy() for name, value in rotary.named_buffers()]
    scales = {name: value for name, value in vars(rotary).items() if "scaling" in name}
    return found, scales


def assert_same_rope(config, reference):
    assert rope_parameters_of(config) == rope_parameters_of(reference)
    assert config.max_position_embeddings == reference.max_position_embeddings
    for found, expected in zip(frequencies(config), frequencies(reference), strict=True):
        np.testing.assert_equal(found, expected)


@pytest.mark.parametrize(("family", "preset"), CASES)
def test_transformers_5_builds_the_same_model_from_both_spellings_and_saves_it_again(
    family, preset, tmp_path
):
    config = extended(family, preset)
    alone = saved(config, tmp_path)
    both = write_rope(alone, rope_parameters_of(config), config.max_position_embeddings)
    loaded = read(both, tmp_path)
    assert_same_rope(loaded, config)
    again = read(saved(loaded, tmp_path), tmp_path)
    assert rope_parameters_of(again) == rope_parameters_of(config)
    assert write_rope(both, rope_parameters_of(config), config.max_position_embeddings) == both


@pytest.mark.parametrize(("family", "preset"), CASES)
def test_the_old_spelling_alone_is_complete(family, preset, tmp_path):
    config = extended(family, preset)
    both = write_rope(saved(config, tmp_path), rope_parameters_of(config), TARGET)
    both["max_position_embeddings"] = config.max_position_embeddings
    del both["rope_parameters"]
    assert_same_rope(read(both, tmp_path), config)


@pytest.mark.parametrize(("family", "preset"), CASES)
def test_a_config_that_keeps_both_spellings_saves_what_write_rope_writes(family, preset, tmp_path):
    config = extended(family, preset)
    before = copy.deepcopy(rope_parameters_of(config))
    alone = saved(config, tmp_path)
    keep_both_spellings(config)
    assert rope_parameters_of(config) == before
    expected = write_rope(alone, before, config.max_position_embeddings)
    assert saved(config, tmp_path) == expected
    assert_same_rope(AutoConfig.from_pretrained(tmp_path), extended(family, preset))
    assert_same_rope(copy.deepcopy(config), extended(family, preset))
    keep_both_spellings(config)
    assert saved(config, tmp_path) == expected


def test_stale_fields_of_the_base_are_gone_and_text_configs_are_found():
    old = {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}, "hidden_size": 8}
    plain = {"rope_type": "default", "rope_theta": 5e5}
    changed = write_rope({"text_config": old, "vision_config": {"rope_theta": 3.0}}, plain, 512)
    assert changed["vision_config"] == {"rope_theta": 3.0}
    assert changed["text_config"] == {
        "hidden_size": 8,
        "max_position_embeddings": 512,
        "rope_parameters": plain,
        "rope_theta": 5e5,
    }


@pytest.mark.parametrize(
    ("preset", "at_the_top"),
    [("yarn", None), ("linear", None), ("llama3", ORIGINAL), ("longrope", ORIGINAL)],
)
def test_the_original_context_is_at_the_top_for_the_readers_that_look_there(preset, at_the_top):
    settings = resolve_rope(preset, tiny(LlamaConfig), TARGET, **options_for(preset, 32))
    fields = rope_fields(settings.rope_parameters, TARGET)
    assert fields.get("original_max_position_embeddings") == at_the_top
    scaling = fields["rope_scaling"]
    assert (scaling["rope_type"], scaling["type"]) == (preset, preset)
    assert scaling.get("original_max_position_embeddings") == (
        None if preset == "linear" else ORIGINAL
    )


def test_a_longrope_factor_beyond_the_ratio_of_the_contexts_is_spelled_out():
    config = tiny(LlamaConfig)
    settings = resolve_rope("longrope", config, TARGET, factor=6, **lists(32))
    scaling = rope_fields(settings.rope_parameters, TARGET)["rope_scaling"]
    apply_rope(config, settings)
    assert scaling["attention_factor"] == rotary_of(build(config)).attention_scaling


def test_model_specific_keys_are_in_both_spellings():
    parameters = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 1, 1]}
    assert rope_fields(parameters, 512)["rope_scaling"] == {
        "rope_type": "default",
        "type": "default",
        "mrope_section": [2, 1, 1],
    }


def test_families_younger_than_transformers_5_keep_their_one_spelling():
    nested = {"full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 2.0}}
    assert set(rope_fields(nested, 512, "gemma4_text")) == {
        "rope_parameters",
        "max_position_embeddings",
    }


def test_a_multimodal_config_keeps_both_spellings_in_its_text_config(tmp_path):
    text = {**tiny(LlamaConfig).to_dict(), **GEMMA3, "max_position_embeddings": ORIGINAL}
    text = {key: text[key] for key in ("hidden_size", "num_hidden_layers", *GEMMA3)}
    config = Gemma3Config(text_config=text)
    apply_rope(
        config, resolve_rope("linear", config, 2 * config.text_config.max_position_embeddings)
    )
    keep_both_spellings(config)
    stored = saved(config, tmp_path)["text_config"]
    assert stored["rope_scaling"]["factor"] == 2
    assert (stored["rope_theta"], stored["rope_local_base_freq"]) == (1e6, 1e4)


def test_a_model_without_rope_is_left_alone():
    from transformers import GPT2Config

    config = GPT2Config()
    before = config.to_dict()
    keep_both_spellings(config)
    assert config.to_dict() == before

"""The rotary embedding of a built model is held against what its run decided."""

from __future__ import annotations

import pytest
import torch
from axolotl_runs import write_recipe
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, MixtralConfig

from longlora_plugin.rope import apply_rope, check_built_rope, resolve_rope

SMALL = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
}
FAMILIES = {
    "llama": lambda: LlamaConfig(**SMALL),
    "mixtral": lambda: MixtralConfig(**SMALL, num_local_experts=2),
    "gemma3": lambda: Gemma3TextConfig(
        **SMALL, layer_types=["sliding_attention", "full_attention"], sliding_window=16
    ),
}


def built(config):
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("preset", ["linear", "yarn", "dynamic", "ntk", "llama3"])
def test_a_model_built_with_the_settings_passes_and_one_without_is_refused(family, preset):
    config = FAMILIES[family]()
    settings = resolve_rope(preset, config, 256)
    plain = built(FAMILIES[family]())
    apply_rope(config, settings)
    assert check_built_rope(built(config), settings.config_fields) == 1
    if preset == "dynamic":
        return  # it starts from the unscaled frequencies
    with pytest.raises(ValueError, match="built with another RoPE"):
        check_built_rope(plain, settings.config_fields)


def test_a_wrong_attention_scaling_alone_is_refused():
    config = FAMILIES["llama"]()
    settings = resolve_rope("yarn", config, 256)
    apply_rope(config, settings)
    model = built(config)
    model.model.rotary_emb.attention_scaling = 1.0
    with pytest.raises(ValueError, match=r"attention_scaling of .* is 1\.0, not 1\.13"):
        check_built_rope(model, settings.config_fields)


def test_half_precision_is_no_difference_and_a_small_factor_is():
    config = FAMILIES["llama"]()
    apply_rope(config, settings := resolve_rope("linear", config, 256))
    model = built(config).to(torch.bfloat16)
    assert check_built_rope(model, settings.config_fields) == 1
    with pytest.raises(ValueError, match="built with another RoPE"):
        check_built_rope(model, resolve_rope("linear", FAMILIES["llama"](), 320).config_fields)


# ---- through Axolotl's own loader -----------------------------------------------------------


@pytest.fixture
def load(tmp_path, tiny_model_dir, tiny_dataset):
    """Function (spoil=…, **recipe) → the model that Axolotl builds of a recipe."""
    from axolotl.cli.config import load_cfg
    from axolotl.integrations.base import PluginManager
    from axolotl.loaders import ModelLoader, load_tokenizer

    plugins = PluginManager.get_instance().plugins
    before = dict(plugins)

    def model_of(spoil=lambda cfg: None, **recipe):
        keys = {"longlora": {"rope": "linear"}, **recipe}
        path = write_recipe(tmp_path, tiny_model_dir("untied"), tiny_dataset, **keys)
        cfg = load_cfg(str(path))
        spoil(cfg)
        return ModelLoader(cfg, load_tokenizer(cfg)).load()[0]

    yield model_of
    PluginManager.get_instance().post_train_unload(None)
    plugins.clear()
    plugins.update(before)


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"model_config": None},
        {"model_config": {}},
        {"model_config": {"attention_dropout": 0.0}},
        {"overrides_of_model_config": {"attention_dropout": 0.0}},
        {"overrides_of_model_config": None},
        {"model_config": None, "overrides_of_model_config": {"attention_dropout": 0.0}},
        {"model_config": {"attention_dropout": 0.0}, "overrides_of_model_config": None},
    ],
    ids=str,
)
def test_rope_reaches_the_model_however_the_section_is_spelt(load, sections):
    rotary = load(**sections).get_base_model().model.rotary_emb
    plain = 1.0 / 10000.0 ** (torch.arange(0, 16, 2) / 16)
    assert torch.allclose(rotary.inv_freq, plain / 4)


OWN = {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}


@pytest.mark.parametrize(
    "sections",
    [
        {"model_config": OWN},
        {"overrides_of_model_config": OWN},
        {"model_config": None, "overrides_of_model_config": OWN},
    ],
)
def test_a_recipes_own_rope_reaches_the_model(load, sections):
    model = load(longlora={"rope": "none"}, **sections).get_base_model()
    plain = 1.0 / 10000.0 ** (torch.arange(0, 16, 2) / 16)
    assert torch.allclose(model.model.rotary_emb.inv_freq, plain / 2)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"model_kwargs": {"config": None}}, "model_kwargs.config: None would build the model"),
        ({"overrides_of_model_kwargs": {"config": None}}, "model_kwargs.config: None would build"),
        ({"model_kwargs": {"rope_parameters": {}}}, "model_kwargs.rope_parameters"),
        (
            {"model_config": {"use_cache": False}, "overrides_of_model_config": {"a": 1}},
            "two names of one section",
        ),
        ({"model_config": 3}, "model_config: got 3; write a block"),
    ],
    ids=str,
)
def test_a_section_that_would_replace_rope_is_refused_before_anything_loads(load, keys, says):
    with pytest.raises(ValueError, match=says):
        load(**keys)


@pytest.mark.parametrize("keys", [{}, {"longlora": {"rope": "none"}, "model_config": OWN}], ids=str)
def test_rope_that_is_lost_on_the_way_to_the_model_stops_the_run(load, keys):
    def spoil(cfg):
        cfg.overrides_of_model_config = None

    with pytest.raises(ValueError, match=r"built with another RoPE than .*linear"):
        load(spoil, **keys)

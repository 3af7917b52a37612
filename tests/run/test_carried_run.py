"""The decision of a run goes with its recipe through the real Axolotl; no recipe can fake it."""

from __future__ import annotations

import copy
import pickle

import pytest
import yaml
from axolotl_runs import write_recipe

from longlora_plugin.args import CarriedRun


@pytest.fixture
def load_cfg():
    from axolotl.cli.config import load_cfg
    from axolotl.integrations.base import PluginManager

    plugins = PluginManager.get_instance().plugins
    before = dict(plugins)
    yield load_cfg
    plugins.clear()
    plugins.update(before)


@pytest.fixture
def path(tmp_path, tiny_model_dir, tiny_dataset):
    return write_recipe(tmp_path, tiny_model_dir("untied"), tiny_dataset)


def run_of(cfg):
    assert isinstance(cfg.longlora, CarriedRun)
    return cfg.longlora.run


def test_each_recipe_carries_its_own_run_through_validation_and_copies(load_cfg, path):
    first = load_cfg(str(path))
    second = load_cfg(str(path), sequence_len=128, longlora__group_size=16)
    assert (run_of(first).target_context, run_of(first).group_size) == (256, 64)
    assert (run_of(second).target_context, run_of(second).group_size) == (128, 16)
    assert run_of(first).adapter == "longlora"
    assert first.adapter == "lora"
    for each in (copy.deepcopy(first), type(first)(first.to_dict())):
        assert run_of(each) == run_of(first)
    assert run_of(type(first)(pickle.loads(pickle.dumps(first.to_dict())))) == run_of(first)


def test_a_worker_that_registers_a_validated_recipe_again_changes_nothing(load_cfg, path):
    from axolotl.cli.config import prepare_plugins  # as a Ray worker does

    cfg = load_cfg(str(path))
    before = cfg.to_dict()
    prepare_plugins(cfg)
    assert cfg.to_dict() == before


def test_resolved_is_no_key_that_a_recipe_can_write(load_cfg, path):
    recipe = yaml.safe_load(path.read_text())
    for value in ({}, {"adapter": "longlora", "group_size": 3, "target_context": 1}):
        path.write_text(yaml.safe_dump({**recipe, "longlora": {"resolved": value}}))
        with pytest.raises(ValueError, match=r"longlora\.resolved is not a key of the longlora"):
            load_cfg(str(path))


def test_a_recipe_that_was_never_registered_is_an_error_in_the_first_hook(load_cfg, path):
    from axolotl.utils.dict import DictDefault

    from longlora_plugin import LongLoRAPlugin

    cfg = DictDefault(yaml.safe_load(path.read_text()))
    with pytest.raises(ValueError, match=r"without the plugin's register"):
        LongLoRAPlugin().pre_model_load(cfg)

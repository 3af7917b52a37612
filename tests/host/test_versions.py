"""How Axolotl loads the plugin: by the recipe's line (0.19 on), by its entry point (0.21), by both;
each counts once, and without our keys nothing changes."""

from __future__ import annotations

import logging
from collections import Counter

import click
import pytest
import torch
from axolotl.integrations.base import PluginManager
from axolotl_runs import CONTEXT, train_in_process, write_recipe

from longlora_plugin.host import compat
from longlora_plugin.plugin import LongLoRAPlugin

NAMES = ("longlora_plugin.LongLoRAPlugin", "longlora_plugin.plugin.LongLoRAPlugin")


@pytest.fixture(autouse=True)
def fresh_manager():
    """Plugins of other tests stay out: the manager is one object for the whole process."""
    manager = PluginManager()
    before = dict(manager.plugins)
    manager.plugins.clear()
    yield manager
    manager.plugins.clear()
    manager.plugins.update(before)


@pytest.fixture
def our_log():
    import axolotl.cli.train  # noqa: F401  (configures logging when it is first imported)

    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    keep = Keep(logging.INFO)
    logger = compat.log.logger
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(keep)
    yield lines
    logger.removeHandler(keep)
    logger.setLevel(level)


def test_plugin_loaded_under_two_names_works_once(
    tmp_path, tiny_model_dir, tiny_dataset, our_log, fresh_manager, monkeypatch
):
    """0.21 does this by itself where a recipe spells the name in another way than the entry
    point: its schema then inherits twice from one class, and every hook runs twice."""
    from longlora_plugin.attention import schedule

    made = Counter()
    monkeypatch.setattr(
        schedule.AttentionSchedule,
        "on_train_begin",
        lambda self, *args, **kwargs: made.update(["schedule"]),
    )
    recipe = write_recipe(
        tmp_path, tiny_model_dir("plain"), tiny_dataset, plugins=list(NAMES), max_steps=2
    )
    saved = train_in_process(recipe)
    ours = [plugin for plugin in fresh_manager.plugins.values() if type(plugin) is LongLoRAPlugin]
    assert len(ours) == 2
    assert [compat.is_duplicate_instance(plugin) for plugin in ours] == [False, True]
    for start in ("LongLoRA RoPE: ", "LongLoRA trained in addition", "LongLoRA shifted attention"):
        assert len([line for line in our_log if line.startswith(start)]) == 1, start
    assert made == {"schedule": 1}
    assert len([name for name in saved if ".lora_" not in name]) == 6


@pytest.mark.skipif(
    not compat.LOADS_INSTALLED_PLUGINS, reason="0.19 loads plugins by the recipe's line only"
)
def test_recipe_needs_no_plugins_line_where_axolotl_finds_the_entry_point(
    tmp_path, tiny_model_dir, tiny_dataset, our_log
):
    recipe = write_recipe(
        tmp_path, tiny_model_dir("plain"), tiny_dataset, plugins=None, max_steps=1
    )
    train_in_process(recipe)
    assert any(line.startswith("LongLoRA shifted attention") for line in our_log)


@pytest.mark.skipif(
    not compat.LOADS_INSTALLED_PLUGINS, reason="0.19 loads plugins by the recipe's line only"
)
def test_auto_loaded_plugin_changes_no_bit_of_a_recipe_without_our_keys(
    tmp_path, tiny_model_dir, tiny_dataset, monkeypatch, fresh_manager
):
    from axolotl.integrations import base

    stock, results = base.entry_points, []
    for name in ("with", "without"):
        if name == "without":
            monkeypatch.setattr(
                base,
                "entry_points",
                lambda **which: [p for p in stock(**which) if "longlora" not in p.value],
            )
            fresh_manager.plugins.clear()
        (tmp_path / name).mkdir()
        recipe = write_recipe(
            tmp_path / name,
            tiny_model_dir("plain"),
            tiny_dataset,
            adapter="lora",
            plugins=None,
            sequence_len=CONTEXT,
            lora_r=4,
            lora_alpha=8,
            lora_target_linear=True,
            max_steps=2,
        )
        results.append(train_in_process(recipe))
        loaded = any(type(p) is LongLoRAPlugin for p in fresh_manager.plugins.values())
        assert loaded == (name == "with")
    ours, theirs = results
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(28, "No space left on device", "/out/x"), "merge: /out/x: No space left"),
        (OSError("no such name on the hub"), "merge: no such name on the hub"),
        (ValueError("wrong"), "merge: wrong"),
    ],
    ids=str,
)
def test_what_a_user_can_fix_is_an_error_without_a_traceback(error, says):
    with pytest.raises(click.ClickException) as raised, compat.recipe_errors("merge: "):
        raise error
    assert raised.value.format_message().startswith(says)

"""Axolotl recipes with two lines added: each still validates, and becomes LongLoRA.

The recipes are written the way Axolotl's own examples are, for LoRA and QLoRA. Only the `plugins`
line and `adapter: longlora` differ from the original recipe; every other key must come out of
Axolotl's validation as it does without us.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import base_configs
import pytest
import yaml
from existing_recipes import EXPECTED, text_of

from longlora_plugin.host.schema import check_schema
from longlora_plugin.recipes.check import ASSUMED_GPU, PLUGIN, capabilities_of, check_recipe
from longlora_plugin.run import prepare
from longlora_plugin.run.base_model import base_config_of

ROOT = Path(__file__).parents[2]


OURS = {"plugins", "longlora", "adapter", "model_config", "overrides_of_model_config"}


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def read(name: str, root: Path) -> dict[str, Any]:
    raw = yaml.safe_load(text_of(name))
    raw["base_model"] = str(base_configs.write(raw["base_model"], root))
    return raw


def with_our_two_lines(raw: dict[str, Any]) -> dict[str, Any]:
    return {**raw, "plugins": [*(raw.get("plugins") or []), PLUGIN], "adapter": "longlora"}


def test_there_are_a_dozen_of_different_kinds():
    text = " ".join(map(text_of, EXPECTED))
    assert len(EXPECTED) >= 12
    for kind in (
        *("sample_packing: true", "chat_template:", "deepspeed:", "fsdp_version: 2", "liger_"),
        *("load_in_4bit: true", "load_in_8bit: true", "type: completion", "attn_implementation"),
    ):
        assert kind in text
    families = {yaml.safe_load(text_of(name))["base_model"] for name in EXPECTED}
    assert len({base_configs.CONFIGS[name]["model_type"] for name in families}) >= 7


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_two_lines_make_a_recipe_longlora_and_change_nothing_else(name, tmp_path):
    expected = EXPECTED[name]
    raw = read(name, tmp_path)
    capabilities = capabilities_of(ASSUMED_GPU, expected.gpus)
    before = check_schema(copy.deepcopy(raw), capabilities)
    assert before.problems == []  # it is a right recipe without us

    ours = with_our_two_lines(raw)
    run = prepare.prepare_run(ours, base_config_of(ours)).checked()
    block = run.block.model_dump(exclude_none=True)
    after = check_schema({**ours, **run.updates, "longlora": block}, capabilities)
    assert (after.problems, after.unknown) == ([], {})

    changed = {
        key
        for key in {*before.config, *after.config} - OURS
        if before.config.get(key) != after.config.get(key)
    }
    # FSDP2 saves no optimizer states beside trained norms with its own checkpointing.
    checkpointing = (before.config.get("fsdp_config") or {}).get("activation_checkpointing")
    assert changed == ({"fsdp_config", "gradient_checkpointing"} if checkpointing else set())
    assert after.config["adapter"] == expected.adapter
    for key, value in expected.lora.items():
        assert after.config[key] == value

    assert run.adapter == "longlora"
    assert run.group_size == expected.group
    assert expected.rope.items() <= run.rope.rope_parameters.items()
    written = after.config.get("overrides_of_model_config") or {}
    if expected.extends is None:
        assert written == {}
    else:
        assert (run.base_context, run.target_context) == expected.extends
        assert written["rope_parameters"] == run.rope.rope_parameters
        assert written["max_position_embeddings"] == expected.extends[1]


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_a_recipe_with_our_two_lines_passes_the_check(name, tmp_path):
    path = tmp_path / "recipe.yml"
    path.write_text(yaml.safe_dump(with_our_two_lines(read(name, tmp_path))))
    assert check_recipe(path, gpus=EXPECTED[name].gpus).problems == []


def test_without_our_lines_the_installed_plugin_leaves_a_recipe_alone(tmp_path):
    raw = read("llama-3-lora-chat-template", tmp_path)
    assert not prepare.asks_for_longlora(raw)
    loaded = {**raw, "plugins": [PLUGIN]}
    capabilities = capabilities_of(ASSUMED_GPU, 1)
    before = check_schema(copy.deepcopy(raw), capabilities).config
    after = check_schema(copy.deepcopy(loaded), capabilities).config
    assert after.pop("plugins") == [PLUGIN]
    assert after == before

"""The JSON Schema of a recipe for editors: Axolotl's keys and the block."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import command
import jsonschema
import pytest
import yaml
from existing_recipes import FOLDER as EXISTING

from longlora_plugin.recipes import longlora_recipes as shipped

run = partial(command.invoke, "recipes")


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    return json.loads(run("schema").output)


def test_the_schema_accepts_every_shipped_recipe(schema):
    for path in shipped().values():
        jsonschema.validate(yaml.safe_load(path.read_text()), schema)
    for path in EXISTING.glob("*.yml"):
        jsonschema.validate(yaml.safe_load(path.read_text()), schema)
    jsonschema.validate({"longlora": None}, schema)
    jsonschema.validate({"longlora": {"rope": {"preset": "yarn", "factor": 8}}}, schema)


@pytest.mark.parametrize(
    "block",
    [
        {"group_sise": 8},
        {"group_size": 7},
        {"group_size": 8, "group_size_ratio": 0.5},
        {"group_size_ratio": 1.5},
        {"rope": "liner"},
        {"rope": {"factor": 8}},
        {"trainable": ["norm"]},
        {"attention_pattern": "s3"},
        {"full_attention_below": -1},
        {"resolved": {}},
    ],
)
def test_the_schema_refuses_what_the_plugin_refuses(schema, block):
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"base_model": "b", "longlora": block}, schema)


@pytest.mark.parametrize(
    "recipe",
    [
        {"sequence_length": 32768},
        {"sequence_len": "32k"},
        {"load_in_4bit": "yes please"},
        {"micro_batch_size": [1]},
        {"rl": "ppoo"},
    ],
)
def test_the_schema_refuses_what_axolotl_refuses_or_ignores(schema, recipe):
    jsonschema.validate({"base_model": "b"}, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"base_model": "b", **recipe}, schema)


def test_the_schema_has_the_keys_of_the_plugins_that_axolotl_ships(schema):
    keys = ("cut_cross_entropy", "liger_fused_linear_cross_entropy", "lm_eval_tasks", "adapter")
    assert all(key in schema["properties"] for key in keys)


def test_the_schema_describes_every_key_for_editors(schema, tmp_path):
    block = schema["properties"]["longlora"]["anyOf"][0]
    assert all(each.get("description") for each in block["properties"].values())
    assert "resolved" not in block["properties"]
    assert run("schema", "--output", tmp_path / "s.json").exit_code == 0
    assert json.loads((tmp_path / "s.json").read_text()) == schema

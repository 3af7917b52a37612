"""A recipe as a JSON Schema, for editors: Axolotl's keys and the `longlora:` block.

An editor is pointed at it with `# yaml-language-server: $schema=…`. Names are those of the packages
installed here; keys of plugins that Axolotl does not ship are unknown to it.
"""

from __future__ import annotations

from typing import Any

from longlora_plugin.args import LongLoRAConfig
from longlora_plugin.registry import provided


def recipe_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a recipe."""
    from longlora_plugin.host.schema import input_schema

    block = LongLoRAConfig.model_json_schema()
    properties = block["properties"]
    presets = {"enum": sorted(provided("longlora_rope_presets"))}
    properties["rope"]["anyOf"] = [
        presets,
        {"type": "object", "properties": {"preset": presets}, "required": ["preset"]},
        {"type": "null"},
    ]
    properties["attention_pattern"]["enum"] = sorted(provided("longlora_attention_patterns"))
    properties["trainable"]["items"] = {"enum": sorted(provided("longlora_trainable_modules"))}
    properties["group_size"]["anyOf"][0] |= {"minimum": 2, "multipleOf": 2}
    properties["group_size_ratio"]["anyOf"][0] |= {"exclusiveMinimum": 0, "maximum": 1}
    block["not"] = {
        "required": ["group_size", "group_size_ratio"],
        "properties": {
            "group_size": {"type": "integer"},
            "group_size_ratio": {"type": "number"},
        },
    }
    block["description"] = "LongLoRA: shifted sparse attention and RoPE scaling."
    schema = input_schema()
    keys = schema["properties"]
    keys["longlora"] = {"anyOf": [block, {"type": "null"}]}
    keys["adapter"] = {**keys["adapter"], "examples": ["longlora", "lora", "qlora"]}
    keys["plugins"] = {**keys["plugins"], "examples": [["longlora_plugin.LongLoRAPlugin"]]}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Axolotl recipe with LongLoRA",
        "additionalProperties": False,
        **schema,
    }

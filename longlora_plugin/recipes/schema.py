"""The `longlora:` block as a JSON Schema, for editors.

It describes a whole recipe of which only our keys are known, so that an editor can be pointed at
it with `# yaml-language-server: $schema=…`. Names are those of the packages installed here.
"""

from __future__ import annotations

from typing import Any

from longlora_plugin.args import LongLoRAConfig
from longlora_plugin.registry import provided


def recipe_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a recipe's `longlora:` block and `adapter`."""
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
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Axolotl recipe with LongLoRA",
        "type": "object",
        "properties": {"longlora": {"anyOf": [block, {"type": "null"}]}},
    }

"""Whether a recipe can be planned: what `recipes check` would refuse, found in an instant.

The names of Axolotl's keys are read from its list of command-line options, without importing it;
where a recipe has a key that is not in the list, Axolotl's own schema decides.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from longlora_plugin.run.axolotl_keys import ATTENTION_ALIASES
from longlora_plugin.run.recipe import Recipe, is_count, number_meant

BOOLEANS = (
    "load_in_4bit",
    "load_in_8bit",
    "sample_packing",
    "chunked_cross_entropy",
    "liger_fused_linear_cross_entropy",
    "layer_offloading",
    "tiled_mlp",
    "lora_target_linear",
    "peft_use_dora",
)
"""Keys that bear on cost and are true or false."""
NUMBERS = (
    "sequence_len",
    "micro_batch_size",
    "gradient_accumulation_steps",
    "max_steps",
    "lora_r",
    "tiled_mlp_num_shards",
    "chunked_cross_entropy_num_chunks",
    "context_parallel_size",
    "sequence_parallel_degree",
    "tensor_parallel_size",
    "expert_parallel_size",
)
"""Keys that bear on cost and are whole numbers from 1 on."""


def screen(recipe: Recipe) -> list[str]:
    """What is wrong with the text of a recipe: its plugin line, its keys, the values that cost."""
    from longlora_plugin.recipes.check import Report, check_plugin_line, repeated_keys, wrong_names

    report = Report(recipe.path)
    check_plugin_line(recipe.raw, report)
    return [
        *repeated_keys(recipe.path),
        *report.problems,
        *wrong_names(recipe.raw),
        *_wrong_values(recipe.raw),
        *_unknown_keys(recipe.raw),
    ]


def _wrong_values(raw: Mapping[str, Any]) -> Iterator[str]:
    alias = raw.get("attn_implementation")
    if isinstance(alias, str) and alias in ATTENTION_ALIASES:
        name = ATTENTION_ALIASES[alias]
        yield f"attn_implementation: got {alias!r}; write attn_implementation: {name}"
    for name in raw.get("plugins") or ():
        if str(name).startswith("longlora_plugin.") and not str(name).endswith("LongLoRAPlugin"):
            yield f"plugins: there is no {name}; write longlora_plugin.LongLoRAPlugin"
    for key in BOOLEANS:
        value = raw.get(key)
        if value is not None and not isinstance(value, bool):
            yield f"{key}: got {value!r}; write {key}: true or {key}: false"
    epochs = raw.get("num_epochs")
    try:
        wrong = epochs is not None and not 0 < float(epochs) < math.inf
    except (TypeError, ValueError):
        wrong = True
    if wrong:
        yield f"num_epochs: got {epochs!r}; write a number above 0, such as num_epochs: 1"
    for key in NUMBERS:
        value = raw.get(key)
        if value is None or is_count(value):
            continue
        if key == "max_steps" and value == -1:
            continue  # transformers' word for "as num_epochs says"
        instead = number_meant(value, 32768 if key == "sequence_len" else 1)
        yield f"{key}: got {value!r}; write a whole number, such as {key}: {instead}"


def _unknown_keys(raw: Mapping[str, Any]) -> Iterator[str]:
    from longlora_plugin.host.schema import check_schema, known_keys

    known = known_keys()
    strange = [key for key in raw if key not in known and key != "longlora"]
    if known and not strange:
        return
    from longlora_plugin.recipes.check import ASSUMED_GPU, capabilities_of

    found = check_schema(raw, capabilities_of(ASSUMED_GPU, 1))
    for key, near in found.unknown.items():
        if key in strange:
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            yield f"{key} is not a key of Axolotl, which would ignore it in silence{hint}"

"""What a run does to its built model, with weights or on the meta device: everything by the run's
decisions, so that a check without weights asks the model exactly what training will.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from longlora_plugin.registry import find
from longlora_plugin.run.axolotl_keys import LORA_TARGETS, TARGET_KEYS
from longlora_plugin.run.prepare import PreparedRun
from longlora_plugin.run.summary import Built

if TYPE_CHECKING:
    from longlora_plugin.attention.install import ShiftedAttention


def trained_modules(run: PreparedRun, model: Any) -> dict[str, list[str]]:
    """Kind → names of the modules that train in addition to LoRA."""
    return {kind: find("longlora_trainable_modules", kind)(model) for kind in run.trainable}


def adapter_keys_of(
    run: PreparedRun, model: Any, recipe: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """The recipe's keys that name modules of this model, and the modules trained besides LoRA.

    Args:
        recipe: as Axolotl has it now, with the run's updates.
    """
    from longlora_plugin.adapter import modules

    names = [name for found in trained_modules(run, model).values() for name in found]
    keys: dict[str, Any] = {}
    if names:
        own = list(recipe.get("lora_modules_to_save") or [])
        chosen = modules.shortest_names(model, names)
        keys["lora_modules_to_save"] = own + [name for name in chosen if name not in own]
        if "embeddings" in run.trainable and modules.embeddings_are_tied(model):
            keys["peft_ensure_weight_tying"] = True
    own_targets = any(run.recipe.get(key) for key in TARGET_KEYS)
    if not own_targets and not modules.has_any_named(model, LORA_TARGETS):
        keys["lora_target_modules"] = modules.attention_projections(model)
    return keys, names


def enable_attention(run: PreparedRun, model: Any) -> ShiftedAttention | None:
    """Turn on the run's shifted attention; None where it trains with full attention.

    Raises:
        ValueError: it covers no layer of this model; says why.
    """
    if not run.group_size:
        return None
    from longlora_plugin.attention import enable_shifted_attention

    handle = enable_shifted_attention(
        model,
        group_size=run.group_size,
        full_attention_below=run.block.full_attention_below,
        pattern=find("longlora_attention_patterns", run.block.attention_pattern),
        target_length=run.target_context,
    )
    if run.context_parallel > 1:
        from longlora_plugin.attention.eligibility import check_shardable

        check_shardable(model, handle.skipped)
    return handle


def built_of(run: PreparedRun, model: Any) -> Built:
    """What training will find, asked of a model without weights and without an adapter.

    Raises:
        ValueError: S²-Attn covers no layer of this model; says why.
    """
    handle = enable_attention(run, model)
    if handle is not None:
        handle.remove()
    if run.adapter != "longlora":
        return Built.of(handle, None, None)
    recipe = {**run.recipe, **run.updates}
    keys, names = adapter_keys_of(run, model, recipe)
    modules = dict(model.named_modules())
    return replace(
        Built.of(handle, None, keys.get("lora_target_modules")),
        modules=len(set(names)),
        parameters=sum(p.numel() for name in set(names) for p in modules[name].parameters()),
    )

"""A run as `longlora.json` records it, and whether an adapter was trained with a run's RoPE."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longlora_plugin.artifacts.manifest import (
    Manifest,
    data_digests,
    digest,
    public_recipe,
    read_manifest,
    versions,
    why_another_rope,
)
from longlora_plugin.run.prepare import PreparedRun


def manifest_of(run: PreparedRun, recipe: Mapping[str, Any]) -> Manifest:
    """The manifest of a run before its first step.

    Args:
        recipe: as the user wrote it.
    """
    rope = run.resolved_rope()
    return Manifest(
        base_model=str(run.base_model),
        base_model_revision=recipe.get("revision_of_model"),
        adapter=run.adapter,
        rope_preset=rope.preset,
        rope_reason=getattr(rope, "chosen_by_auto", None),
        config_fields=run.rope_fields,
        rope_parameters=dict(rope.rope_parameters),
        pretrained_context=run.pretrained_context,
        base_context=run.base_context,
        target_context=run.target_context,
        group_size=run.group_size,
        attention_pattern=run.attention_pattern if run.group_size else None,
        full_attention_below=run.full_attention_below,
        trainable=list(run.trainable),
        recipe=public_recipe(recipe),
        recipe_digest=digest(recipe),
        data_digests=data_digests(recipe),
        versions=versions(),
    )


def check_same_rope(folder: str | Path, run: PreparedRun, key: str) -> None:
    """Compare the RoPE that a folder's weights were trained with and a run's.

    Args:
        key: the recipe's key that names the folder.

    Raises:
        ValueError: they differ; says both, and what to write.
    """
    manifest = read_manifest(folder)
    if manifest is None or run.rope is None:
        return
    difference = why_another_rope(manifest, run.rope.rope_parameters)
    if difference:
        raise ValueError(
            f"{key}: {folder} does not belong to this recipe's RoPE: {difference}. Write "
            f"longlora: {{rope: {manifest.rope_preset}}} and sequence_len: "
            f"{manifest.target_context} as it was trained, or train anew in another output_dir"
        )

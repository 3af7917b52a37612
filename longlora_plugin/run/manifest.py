"""A run as `longlora.json` records it, and whether an adapter was trained with a run's RoPE."""

from __future__ import annotations

from pathlib import Path

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
from longlora_plugin.run.summary import Built


def manifest_of(run: PreparedRun, built: Built | None = None) -> Manifest:
    """The manifest of a run before its first step; without `built`, of one that is not seen."""
    rope, recipe, built = run.resolved_rope(), run.recipe, built or Built()
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
        covered_layers=built.layers,
        uncovered_layers=dict(built.skipped),
        trainable=list(run.trainable),
        trained_modules=built.modules,
        trained_parameters=built.parameters,
        recipe=public_recipe(recipe),
        recipe_digest=digest(recipe),
        data_digests=data_digests(recipe),
        versions=versions(),
    )


def check_start(run: PreparedRun, *, merging: bool) -> None:
    """Refuse to go on from weights, or to merge an adapter, of another RoPE.

    Raises:
        ValueError: says both, and what to write.
    """
    keys = ("lora_model_dir", "resume_from_checkpoint")
    folders = {key: run.updates.get(key) or run.recipe.get(key) for key in keys}
    if merging and not folders["lora_model_dir"]:
        folders = {"output_dir": run.recipe.get("output_dir")}
    for key, folder in folders.items():
        if folder and Path(str(folder)).is_dir():
            check_same_rope(str(folder), run, key)


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

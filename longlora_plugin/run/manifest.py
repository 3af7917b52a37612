"""A run as `longlora.json` records it, and whether an adapter was trained with a run's RoPE."""

from __future__ import annotations

from pathlib import Path

from longlora_plugin.args import read_block
from longlora_plugin.artifacts.manifest import (
    Manifest,
    check_files,
    data_digests,
    digest,
    find_manifest,
    public_recipe,
    read_manifest,
    versions,
    why_another_rope,
)
from longlora_plugin.run.axolotl_keys import ROPE_KEYS, model_config_of
from longlora_plugin.run.prepare import PreparedRun
from longlora_plugin.run.summary import Built

STARTS = ("lora_model_dir", "resume_from_checkpoint", "auto_resume_from_checkpoints")
"""Keys that say what a run starts from."""


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
        attention_pattern=run.block.attention_pattern if run.group_size else None,
        full_attention_below=run.block.full_attention_below,
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


def check_start(run: PreparedRun) -> list[str]:
    """Refuse to go on from weights of another RoPE.

    Returns:
        Warnings: a name on the hub whose RoPE cannot be read.

    Raises:
        ValueError: says both, and what to write.
    """
    warnings = []
    for key in ("lora_model_dir", "resume_from_checkpoint"):
        folder = str(run.updates.get(key) or run.recipe.get(key) or "")
        manifest = None
        if folder and Path(folder).is_dir():
            manifest = read_manifest(folder)
        elif folder and key == "lora_model_dir":
            try:
                manifest = find_manifest(folder)
            except ValueError as error:
                warnings.append(
                    f"{key}: whether it was trained with this RoPE is not checked: {error}"
                )
        if manifest is not None:
            check_files(folder, manifest)
            check_same_rope(folder, manifest, run, key)
    return warnings


def check_merged(run: PreparedRun, folder: Path, key: str) -> list[str]:
    """Refuse to merge an adapter of another RoPE than the recipe asks for.

    Args:
        key: the recipe's key that names the folder.

    Returns:
        A line for each thing in which the recipe is not what the adapter was trained with.

    Raises:
        ValueError: says both, and what to write.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        return []
    check_files(folder, manifest)
    if not _differs_in_length_only(manifest, run):
        check_same_rope(str(folder), manifest, run, key)
    return _differences(manifest, run)


def check_same_rope(folder: str, manifest: Manifest, run: PreparedRun, key: str) -> None:
    """Compare the RoPE that a folder's weights were trained with and a run's.

    Args:
        manifest: the folder's.
        key: the recipe's key that names the folder.

    Raises:
        ValueError: they differ; says both, and what to write.
    """
    if run.rope is None:
        return
    difference = why_another_rope(manifest, run.rope.rope_parameters)
    if difference:
        raise ValueError(
            f"{key}: {folder} does not belong to this recipe's RoPE: {difference}. Write "
            f"longlora: {{rope: {manifest.rope_preset}}} and sequence_len: "
            f"{manifest.target_context} as it was trained, or train anew in another output_dir"
        )


def _differs_in_length_only(manifest: Manifest, run: PreparedRun) -> bool:
    """Whether the recipe asks for the RoPE of the manifest but for `sequence_len`, which a command
    line may have set for one of the two.
    """
    blocks = [read_block(manifest.recipe.get("longlora"))[0], run.block]
    own = [
        {key: value for key, value in model_config_of(recipe).items() if key in ROPE_KEYS}
        for recipe in (manifest.recipe, run.recipe)
    ]
    asked = [(block.rope, block.original_context) for block in blocks]
    return (
        bool(manifest.recipe)
        and manifest.target_context != run.target_context
        and asked[0] == asked[1]
        and own[0] == own[1]
    )


def _differences(manifest: Manifest, run: PreparedRun) -> list[str]:
    given = {
        "sequence_len": (manifest.target_context, run.target_context),
        "base_model": (manifest.base_model, run.base_model),
    }
    return [
        f"{key}: the adapter was trained with {trained}, the recipe says {now}; it is merged "
        + ("as it was trained" if key == "sequence_len" else f"into {now}")
        for key, (trained, now) in given.items()
        if trained != now
    ]

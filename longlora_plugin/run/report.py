"""What a run says about itself: its data before the first step, and where it ended."""

from __future__ import annotations

from logging import Logger, LoggerAdapter
from typing import Any

from longlora_plugin.artifacts.manifest import Manifest
from longlora_plugin.run.document_lengths import DocumentLengths, lengths_in
from longlora_plugin.run.prepare import PreparedRun


def report_data(run: PreparedRun, dataset: Any, log: Logger | LoggerAdapter[Any]) -> None:
    """Say how long the documents that train are, and warn where none can extend the context."""
    lengths = lengths_in(dataset)
    if lengths is None:
        log.info("LongLoRA data: the lengths of documents are not known before they are read")
        return
    measured = DocumentLengths.of(lengths, run.base_context or 0, run.target_context)
    log.info("LongLoRA data: %s", measured)
    if warning := measured.warning():
        log.warning("LongLoRA: %s", warning)


def closing_block(manifest: Manifest, folder: str, recipe: str | None) -> str:
    """The lines that end a run: what was trained, where it is, and the commands that come next.

    Args:
        folder: the run's `output_dir`.
        recipe: its file; None where Axolotl did not say.
    """
    recipe = recipe or "RECIPE.yml"
    measured_on = manifest.recipe.get("test_datasets") or (
        (manifest.recipe.get("longlora") or {}).get("held_out")
    )
    evaluate = f"longlora eval {recipe}" + ("" if measured_on else " --data BOOK.txt")
    merge = [f"axolotl merge-lora {recipe}"] if manifest.adapter else []
    served = f"{folder}/merged" if manifest.adapter else folder
    lines = {
        "trained": _trained(manifest),
        "saved in": folder,
        "context": _context(manifest),
        "steps": _steps(manifest),
        "next": "\n            ".join([evaluate, *merge, f"longlora serve-check {served}"]),
    }
    return "LongLoRA: the run is finished\n" + "\n".join(
        f"  {name:<10}{text}" for name, text in lines.items()
    )


def _trained(manifest: Manifest) -> str:
    if not manifest.adapter:
        return f"the whole of {manifest.base_model}"
    if not manifest.trained_modules:
        return f"a LoRA adapter of {manifest.base_model}"
    return (
        f"a LoRA adapter of {manifest.base_model} and {manifest.trained_modules} modules "
        f"({', '.join(manifest.trainable)}; {manifest.trained_parameters:,} parameters)"
    )


def _steps(manifest: Manifest) -> str:
    full = manifest.full_attention_steps if manifest.group_size else manifest.steps
    kinds = {
        f"shifted attention (groups of {manifest.group_size or 0:,})": manifest.steps - full,
        "full attention": full,
    }
    return ", then ".join(f"{count:,} with {kind}" for kind, count in kinds.items() if count)


def _context(manifest: Manifest) -> str:
    if not manifest.config_fields:
        return f"{manifest.base_context or manifest.target_context:,} tokens, RoPE unchanged"
    before = f"{manifest.base_context:,}" if manifest.base_context else "unknown"
    return f"{before} → {manifest.target_context:,} tokens, RoPE {manifest.rope_preset}"

"""Figures that were measured after training, in `longlora.json` and on the model card."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from longlora_plugin.artifacts.callback import finish
from longlora_plugin.artifacts.card import Kind
from longlora_plugin.artifacts.manifest import FILE, read_manifest
from longlora_plugin.checkpoints.files import is_adapter


def check_has_card(folder: Path) -> None:
    """Raise ValueError unless training here has written what a card is made from."""
    if read_manifest(folder) is None:
        raise ValueError(f"--card: {folder} has no {FILE}, which a card is made from; train first")


def add_results(folder: Path, rows: Iterable[Mapping[str, Any]]) -> list[Path]:
    """Put rows of `eval`, `passkey` or `bench` on the cards of a run and of its merged model.

    Args:
        folder: of the run.
        rows: of the trained model; a figure that is there is replaced.

    Returns:
        The cards.
    """
    cards = []
    new = {_question(row): row for row in map(_result, rows)}
    for each in (folder, folder / "merged"):
        manifest = read_manifest(each)
        if manifest is None:
            continue
        results = {_question(row): row for row in manifest.results} | new
        kind: Kind = "adapter" if is_adapter(each) else "merged" if manifest.adapter else "model"
        finish(each, replace(manifest, results=list(results.values())), kind)
        cards.append(each / "README.md")
    return cards


def _result(row: Mapping[str, Any]) -> dict[str, Any]:
    if "perplexity" in row:
        found = {"metric": "perplexity", "data": row["data"], "length": row["length"]}
        return {**found, "value": row["perplexity"]}
    if "accuracy" in row:
        found = {"metric": "passkey accuracy", "length": row["length"], "depth": row["depth"]}
        return {**found, "value": row["accuracy"]}
    found = {"metric": f"{row['task']} ({row['metric']})", "length": row["length"]}
    return {**found, "value": row["score"]}


def _question(result: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted((key, value) for key, value in result.items() if key != "value"))

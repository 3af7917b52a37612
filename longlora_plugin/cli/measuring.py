"""What `eval`, `passkey` and `bench` share: the recipe's models, several processes, the rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longlora_plugin.cli.output import Output

if TYPE_CHECKING:
    from longlora_plugin.evaluation.loading import ModelSource
    from longlora_plugin.evaluation.options import Files, ModelChoice
    from longlora_plugin.evaluation.processes import Processes
    from longlora_plugin.evaluation.results import Row
    from longlora_plugin.evaluation.sweep import Experiment
    from longlora_plugin.run.recipe import Recipe


@dataclass(frozen=True)
class Measuring:
    """One command's run over the models of a recipe."""

    recipe: Recipe
    sources: list[ModelSource]
    processes: Processes
    out: Output
    card: Path | None
    target_context: int

    @classmethod
    def start(cls, path: Path, choice: ModelChoice, files: Files) -> Measuring:
        """Read the recipe, find its models, and try the files.

        Raises:
            ValueError: something is wrong with one of them.
        """
        from transformers.utils import logging

        from longlora_plugin.artifacts.results import check_has_card
        from longlora_plugin.evaluation.models import model_sources
        from longlora_plugin.evaluation.processes import Processes
        from longlora_plugin.run.recipe import read_recipe

        recipe = read_recipe(path)
        card = Path(choice.adapter or recipe.output_dir) if files.card else None
        if card is not None:
            check_has_card(card)
        processes = Processes.here()
        out = Output(files.json, files.plot, quiet=not processes.main)
        labels = [
            part
            for given in choice.models
            for part in ([given] if "=" in given else given.split(","))
        ]
        sources = model_sources(
            recipe,
            labels,
            adapter=choice.adapter,
            unquantized=choice.unquantized,
            device_map=choice.device_map,
        )
        logging.disable_progress_bar()
        for note in dict.fromkeys(note for source in sources for note in source.notes):
            out.note(note)
        run = Path(choice.adapter or recipe.output_dir)
        return cls(recipe, sources, processes, out, card, _target_context(recipe, sources, run))

    @cached_property
    def base_context(self) -> int:
        """Tokens that the base model handles as it is."""
        from longlora_plugin.run.loading import base_context

        return base_context(self.recipe, self.recipe.base_config())

    @cached_property
    def tokenizers(self) -> dict[str, Any]:
        """The tokenizer of each model, by label; equal ones are one object."""
        from longlora_plugin.evaluation.loading import same_tokenizer

        found: dict[str, Any] = {}
        for source in self.sources:
            own = source.load_tokenizer()
            found[source.label] = next(
                (other for other in found.values() if same_tokenizer(other, own)), own
            )
        return found

    def default_lengths(self) -> tuple[int, ...]:
        """The base model's context, its doublings, and the length that was trained for."""
        from longlora_plugin.evaluation.windows import default_lengths

        return tuple(default_lengths(self.base_context, self.target_context))

    def sweep(self, experiment: Experiment) -> list[Row]:
        """All rows of an experiment; with `--json -` they are printed."""
        from longlora_plugin.artifacts.results import add_results
        from longlora_plugin.evaluation.hub_results import trained_rows
        from longlora_plugin.evaluation.sweep import sweep
        from longlora_plugin.run.loading import choose_dtype

        with self.out.progress() as progress:
            rows = sweep(
                experiment,
                self.sources,
                dtype=choose_dtype(self.recipe, self.processes.device),
                processes=self.processes,
                json_path=self.out.json_file,
                note=self.out.note,
                progress=progress,
            )
        if self.out.is_piped:
            self.out.write_json(rows)
        if self.card is not None and self.processes.main:
            for path in add_results(self.card, trained_rows(rows)):
                self.out.note(f"results are on the card {path}")
        return rows


def _target_context(recipe: Recipe, sources: Sequence[ModelSource], run: Path) -> int:
    """Tokens that the measured model was trained for; the recipe's where none was trained.

    Args:
        run: folder that the recipe trains into.
    """
    from longlora_plugin.artifacts.manifest import read_manifest

    trained = [source.adapter or Path(source.weights) for source in sources]
    for folder in (*(path for path in trained if path != Path(recipe.base_model)), run):
        manifest = read_manifest(folder)
        if manifest is not None:
            return manifest.target_context
    return recipe.sequence_len

"""`longlora passkey`: retrieval of a hidden number by length and depth."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from longlora_plugin.cli.measuring import Measuring
from longlora_plugin.cli.options import options_from
from longlora_plugin.evaluation.options import Files, ModelChoice, PasskeyOptions


@click.command(
    "passkey",
    epilog="Several processes: accelerate launch --num_processes N -m longlora_plugin.cli "
    "passkey …",
)
@click.argument("recipe", type=click.Path(dir_okay=False, path_type=Path))
@options_from(PasskeyOptions, ModelChoice, Files)
def command(options: PasskeyOptions, choice: ModelChoice, files: Files, recipe: Path) -> None:
    """Does the model find a number hidden in a long text?

    Asks the base model, the base model with the recipe's RoPE (no training), and what the recipe
    trained, if its output_dir has it; with full attention. The paper's quick look: `bench` has
    RULER's harder ones.

    Rows that --json already has for the very same settings are kept, so a killed run goes on.
    """
    from longlora_plugin.evaluation.passkey import PasskeyGrid
    from longlora_plugin.evaluation.plots import plot_heat_map
    from longlora_plugin.evaluation.tables import depth_tables

    run = Measuring.start(recipe, choice, files)
    options = dataclasses.replace(options, lengths=options.lengths or run.default_lengths())
    rows = run.sweep(PasskeyGrid(run.tokenizers, options, run.processes))
    if not run.processes.main:
        return
    for table in depth_tables(rows):
        run.out.table(table)
    if run.out.plot:
        plot_heat_map(
            rows,
            run.out.plot,
            base_context=run.base_context,
            target_context=run.target_context,
        )
    run.out.wrote_files()

"""`axolotl longlora passkey`: retrieval of a hidden number by length and depth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from longlora_plugin.cli.evaluation_options import (
    Depths,
    Integers,
    model_options,
    progress_bar,
    rows_options,
)


@click.command(
    "passkey",
    epilog="Several processes: accelerate launch --num_processes N -m longlora_plugin.cli "
    "passkey …",
)
@click.argument("recipe", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--lengths",
    type=Integers(),
    default=None,
    metavar="512,1024,…",
    help="Tokens of prompt and answer at most; missed by less than one filler sentence. Default: "
    "the original context, its doublings, sequence_len.",
)
@click.option(
    "--depths",
    type=Depths(),
    default="0,0.25,0.5,0.75,1",
    show_default=True,
    metavar="0,0.5,…",
    help="Shares of the text before the number, or random: another one each trial, as the "
    "original script has it.",
)
@click.option(
    "--needles",
    type=Integers(),
    default="1",
    show_default=True,
    metavar="1,4,…",
    help="How many numbers are hidden; one of them is asked for.",
)
@click.option(
    "--trials",
    type=click.IntRange(min=1),
    default=10,
    show_default=True,
    help="Questions for each length, depth and number of needles.",
)
@click.option(
    "--by",
    type=click.Choice(["generate", "likelihood"]),
    default="generate",
    show_default=True,
    help="generate: greedy decoding, the answer is exactly the number. likelihood: the number is "
    "likelier than all distractors (cheaper, and easier).",
)
@click.option("--digits", type=click.IntRange(1, 18), default=5, show_default=True)
@click.option(
    "--distractors",
    type=click.IntRange(min=1),
    default=9,
    show_default=True,
    help="Wrong numbers, with --by likelihood.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Decides every trial.")
@click.option("--batch-size", type=click.IntRange(min=1), help="Prompts in a forward pass.")
@model_options
@rows_options
def command(
    recipe: Path,
    lengths: list[int] | None,
    depths: list[Any],
    needles: list[int],
    trials: int,
    by: Any,
    digits: int,
    distractors: int,
    seed: int,
    batch_size: int | None,
    models: tuple[str, ...],
    adapter: str | None,
    json_path: str | None,
    plot: str | None,
) -> None:
    """Does the model find a number hidden in a long text?

    Asks the base model, the base model with the recipe's RoPE (no training), and what the recipe
    trained, if its output_dir has it; with full attention.

    Rows that --json already has for the very same settings are kept, so a killed run goes on.
    """
    from rich.console import Console
    from transformers.utils import logging

    from longlora_plugin.evaluation.models import (
        base_context,
        choose_dtype,
        load_tokenizer,
        model_sources,
        rope_notes,
    )
    from longlora_plugin.evaluation.needle_grid import Grid, ask
    from longlora_plugin.evaluation.needle_report import depth_tables, plot_heat_map
    from longlora_plugin.evaluation.processes import Processes
    from longlora_plugin.evaluation.windows import default_lengths
    from longlora_plugin.run.recipe import read_recipe

    read = read_recipe(recipe)
    processes = Processes.here()
    sources = model_sources(read, models, adapter=adapter)
    original = base_context(read, read.base_config())
    grid = Grid(
        lengths=lengths or default_lengths(original, read.sequence_len),
        depths=depths,
        needles=needles,
        trials=trials,
        by=by,
        digits=digits,
        distractors=distractors,
        seed=seed,
        batch_size=batch_size,
    )
    logging.disable_progress_bar()
    console = Console(stderr=True, quiet=not processes.main)
    for note in rope_notes(sources):
        console.print(f"note: {note}", highlight=False)
    with progress_bar(console) as on_progress:
        rows = ask(
            sources,
            load_tokenizer(read),
            grid,
            dtype=choose_dtype(read.raw, processes.device),
            processes=processes,
            json_path=json_path,
            on_note=lambda note: console.print(f"note: {note}", highlight=False),
            on_progress=on_progress,
        )
    if not processes.main:
        return
    out = Console()
    for table in depth_tables(rows):
        out.print(table)
    if plot:
        plot_heat_map(rows, plot, base_context=original, target_context=read.sequence_len)
    for what, path in (("rows", json_path), ("plot", plot)):
        if path:
            out.print(f"{what}: {path}", highlight=False, soft_wrap=True)

"""`longlora bench`: RULER and other benchmarks of lm-eval, by context length."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import click

from longlora_plugin.cli.measuring import Measuring
from longlora_plugin.cli.options import options_from
from longlora_plugin.cli.output import Output
from longlora_plugin.evaluation.options import BenchOptions, Files, ModelChoice
from longlora_plugin.evaluation.suites import EXTERNAL, HELMET_LENGTH

if TYPE_CHECKING:
    from longlora_plugin.evaluation.results import Row


@click.command(
    "bench",
    epilog="Several processes: accelerate launch --num_processes N -m longlora_plugin.cli bench …",
)
@click.argument("recipe", type=click.Path(dir_okay=False, path_type=Path))
@options_from(BenchOptions, ModelChoice, Files)
def command(options: BenchOptions, choice: ModelChoice, files: Files, recipe: Path) -> None:
    """RULER and other benchmarks, run by lm-eval on the models of RECIPE.

    Models are built as `eval` builds them, with the recipe's RoPE, the run's adapter and its own
    tokenizer. Prompts are never cut without a word. Scores in --json are lm-eval's, 0 to 1.

    Rows that --json already has for the very same settings are kept, so a killed run goes on.
    """
    outside = [name for name in options.tasks if name in EXTERNAL]
    if outside:
        _print_commands(outside, recipe)
        options = dataclasses.replace(
            options, tasks=tuple(name for name in options.tasks if name not in EXTERNAL)
        )
        if not options.tasks:
            return
    run = Measuring.start(recipe, choice, files)
    tasks = options.tasks or (_default_suite(run.out),)
    options = dataclasses.replace(
        options, tasks=tasks, lengths=options.lengths or run.default_lengths()
    )
    from longlora_plugin.evaluation.bench import Bench

    rows = run.sweep(Bench(run.tokenizers, options, run.processes, run.out.note))
    if run.processes.main:
        _report(run, rows, options)


def _report(run: Measuring, rows: list[Row], options: BenchOptions) -> None:
    from longlora_plugin.evaluation.hub_results import write_eval_results
    from longlora_plugin.evaluation.plots import plot_scores
    from longlora_plugin.evaluation.tables import bench_tables, effective_length, labels_of

    if not rows:
        raise ValueError("no task fits any of these lengths; give longer ones")
    for table in bench_tables(rows):
        run.out.table(table)
    for label in labels_of(rows):
        found = effective_length([r for r in rows if r["model"] == label], options.threshold)
        length = "below the shortest length" if found is None else f"{found} tokens"
        run.out.print(
            f"effective length of {label}: {length} (mean score of at least "
            f"{options.threshold:.1%})"
        )
    if run.out.plot:
        plot_scores(rows, run.out.plot)
    run.out.wrote_files()
    run.out.wrote("as lm-eval writes it", options.output_path)
    if options.eval_results:
        run.out.wrote("for the hub", write_eval_results(rows, Path(options.eval_results)))


def _default_suite(out: Output) -> str:
    import socket

    from huggingface_hub import constants

    try:
        if constants.HF_HUB_OFFLINE:
            raise OSError
        socket.create_connection(("huggingface.co", 443), timeout=3).close()
        return "ruler"
    except OSError:
        out.note("the Hugging Face hub cannot be reached: ruler-offline, the tasks without data")
        return "ruler-offline"


def _print_commands(names: list[str], path: Path) -> None:
    from longlora_plugin.run.recipe import read_recipe

    recipe = read_recipe(path)
    merged = (recipe.output_dir / "merged").resolve()
    click.echo(f"# First: axolotl merge-lora {path}")
    for name in names:
        length = recipe.sequence_len
        helmet = "$task" if length >= HELMET_LENGTH else "${task}_short"
        click.echo(EXTERNAL[name].format(merged=merged, length=length, helmet=helmet) + "\n")

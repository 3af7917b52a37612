"""`longlora eval`: perplexity by context length and position."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from longlora_plugin.cli.measuring import Measuring
from longlora_plugin.cli.options import options_from
from longlora_plugin.evaluation.options import Files, ModelChoice, PerplexityOptions

if TYPE_CHECKING:
    from longlora_plugin.evaluation.data import Corpus


@click.command(
    "eval",
    epilog="Several processes: accelerate launch --num_processes N -m longlora_plugin.cli eval …",
)
@click.argument("recipe", type=click.Path(dir_okay=False, path_type=Path))
@options_from(PerplexityOptions, ModelChoice, Files)
def command(options: PerplexityOptions, choice: ModelChoice, files: Files, recipe: Path) -> None:
    """Perplexity by context length and position, with full attention.

    Measures the base model, the base model with the recipe's RoPE (no training), and what the
    recipe trained, if its output_dir has it; each with its own tokenizer. The tables give
    perplexity for each context length, and for each position in the longest window.

    Rows that --json already has for the very same settings are kept, so a killed run goes on.
    """
    from longlora_plugin.evaluation import plots, tables
    from longlora_plugin.evaluation.lengths import Contexts, PerplexityByLength

    run = Measuring.start(recipe, choice, files)
    options = dataclasses.replace(options, lengths=options.lengths or run.default_lengths())
    contexts = Contexts(run.base_context, run.target_context)
    corpora = _corpora(run, options)
    experiment = PerplexityByLength(corpora, options, contexts, run.processes, run.out.note)
    rows = run.sweep(experiment)
    if not run.processes.main:
        return
    run.out.table(tables.length_table(rows))
    if len({corpus.digest for corpus in corpora.values()}) > 1:
        run.out.table(tables.byte_table(rows))
    run.out.table(tables.bucket_table(rows))
    for verdict in tables.verdicts(rows):
        run.out.print(verdict, markup=False)
    if run.out.plot:
        plots.plot_positions(rows, run.out.plot)
    run.out.wrote_files()
    run.out.wrote("token losses", options.tokens)


def _corpora(run: Measuring, options: PerplexityOptions) -> dict[str, Corpus]:
    """The text in the tokens of each model."""
    from longlora_plugin.evaluation.data import read_corpus
    from longlora_plugin.run.recipe import held_out_data

    data, text_field = list(options.data), options.text_field
    if not data:
        block = run.recipe.block
        data, named = held_out_data(run.recipe.raw, block.held_out if block else None)
        text_field = text_field or named
    first = next(iter(run.tokenizers.values()))
    read = read_corpus(
        data,
        first,
        text_field=text_field or "text",
        split=options.split,
        max_tokens=options.max_tokens,
    )
    by_tokenizer: dict[int, Any] = {id(first): read}
    for tokenizer in run.tokenizers.values():
        if id(tokenizer) not in by_tokenizer:
            by_tokenizer[id(tokenizer)] = read.tokenized_by(tokenizer)
    return {label: by_tokenizer[id(tokenizer)] for label, tokenizer in run.tokenizers.items()}

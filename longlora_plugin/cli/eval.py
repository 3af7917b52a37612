"""`axolotl longlora eval`: perplexity by context length and position."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from longlora_plugin.cli.evaluation_options import (
    Integers,
    model_options,
    progress_bar,
    rows_options,
)


@click.command(
    "eval",
    epilog="Several processes: accelerate launch --num_processes N -m longlora_plugin.cli eval …",
)
@click.argument("recipe", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--data",
    multiple=True,
    metavar="PATH",
    help="Text file, JSON Lines file with a text field, folder of those, or a Hugging Face "
    "dataset (name or name:configuration). Repeatable. Default: the recipe's test_datasets.",
)
@click.option("--text-field", default=None, help="Field that holds the text. Default: text.")
@click.option("--split", default=None, help="Split of a dataset. Default: test, else validation.")
@click.option(
    "--lengths",
    type=Integers(),
    default=None,
    metavar="512,1024,…",
    help="Context lengths. Default: the original context, its doublings, sequence_len.",
)
@click.option(
    "--stride",
    type=click.IntRange(min=1),
    default=None,
    help="Tokens a window moves by. Default: half of each length.",
)
@click.option(
    "--score",
    type=click.Choice(["new", "all"]),
    default="new",
    show_default=True,
    help="new: each token once, in the first window that reads it. all: every token of every "
    "window, the original LongLoRA script's average.",
)
@click.option(
    "--buckets",
    type=Integers(),
    default=None,
    metavar="N or 0,256,…",
    help="Position buckets: how many equal ones, or their edges. Default: two to a doubling.",
)
@click.option("--max-tokens", type=click.IntRange(min=2), help="Use the first tokens only.")
@click.option("--batch-size", type=click.IntRange(min=1), help="Windows in a forward pass.")
@click.option("--tokens", "tokens_path", metavar="FILE", help="Token losses, safetensors.")
@click.option("--long-ppl", is_flag=True, help="Also LongPPL: key tokens only, arXiv 2410.23771.")
@click.option("--long-ppl-context", type=click.IntRange(min=2), help="Its short context, tokens.")
@click.option(
    "--long-ppl-gain",
    type=float,
    help="Least gain of a key token from the long context, nats. Default: the paper's 2.",
)
@click.option(
    "--long-ppl-log-probability",
    type=float,
    help="Least log-probability of a key token, nats. Default: the paper's -2.",
)
@click.option("--long-ppl-model", help="Model that finds the key tokens. Default: the last.")
@model_options
@rows_options
def command(
    recipe: Path,
    data: tuple[str, ...],
    text_field: str | None,
    split: str | None,
    lengths: list[int] | None,
    stride: int | None,
    score: Any,
    buckets: list[int] | None,
    max_tokens: int | None,
    batch_size: int | None,
    tokens_path: str | None,
    long_ppl: bool,
    long_ppl_context: int | None,
    long_ppl_gain: float | None,
    long_ppl_log_probability: float | None,
    long_ppl_model: str | None,
    models: tuple[str, ...],
    adapter: str | None,
    json_path: str | None,
    plot: str | None,
) -> None:
    """Perplexity by context length and position, with full attention.

    Measures the base model, the base model with the recipe's RoPE (no training), and what the
    recipe trained, if its output_dir has it. The tables give perplexity for each context length,
    and for each position in the longest window.

    Rows that --json already has for the very same settings are kept, so a killed run goes on.
    """
    from rich.console import Console
    from transformers.utils import logging

    from longlora_plugin.evaluation import tables
    from longlora_plugin.evaluation.data import held_out_data, join, read_corpus
    from longlora_plugin.evaluation.lengths import Contexts, Measurement, evaluate
    from longlora_plugin.evaluation.long_ppl import (
        GAIN,
        LOG_PROBABILITY,
        KeyTokens,
        default_short_context,
    )
    from longlora_plugin.evaluation.models import (
        base_context,
        choose_dtype,
        load_tokenizer,
        model_sources,
        rope_notes,
    )
    from longlora_plugin.evaluation.processes import Processes
    from longlora_plugin.evaluation.windows import default_lengths
    from longlora_plugin.run.recipe import read_recipe

    read = read_recipe(recipe)
    paths = list(data)
    if not paths:
        paths, named_field = held_out_data(read.raw)
        text_field = text_field or named_field
    processes = Processes.here()
    sources = model_sources(read, models, adapter=adapter)
    original = base_context(read, read.base_config())
    tokenizer = load_tokenizer(read)
    corpus = join(
        [
            read_corpus(
                path,
                tokenizer,
                text_field=text_field or "text",
                split=split,
                max_tokens=max_tokens,
            )
            for path in paths
        ]
    )
    key_tokens = None
    if long_ppl:
        key_tokens = KeyTokens(
            short_context=long_ppl_context or default_short_context(original),
            gain=GAIN if long_ppl_gain is None else long_ppl_gain,
            log_probability=LOG_PROBABILITY
            if long_ppl_log_probability is None
            else long_ppl_log_probability,
        )
    measurement = Measurement(
        lengths=lengths or default_lengths(original, read.sequence_len),
        stride=stride,
        score=score,
        buckets=buckets[0] if buckets and len(buckets) == 1 else buckets,
        batch_size=batch_size,
        long_ppl=key_tokens,
        long_ppl_model=long_ppl_model,
    )
    logging.disable_progress_bar()
    console = Console(stderr=True, quiet=not processes.main)
    for note in rope_notes(sources):
        console.print(f"note: {note}", highlight=False)
    with progress_bar(console) as on_progress:
        rows = evaluate(
            sources,
            corpus,
            measurement,
            Contexts(original, read.sequence_len),
            dtype=choose_dtype(read.raw, processes.device),
            processes=processes,
            json_path=json_path,
            tokens_path=tokens_path,
            on_note=lambda note: console.print(f"note: {note}", highlight=False),
            on_progress=on_progress,
        )
    if not processes.main:
        return
    out = Console()
    out.print(tables.length_table(rows))
    if long_ppl:
        out.print(tables.length_table(rows, key="long_ppl"))
    out.print(tables.bucket_table(rows))
    if plot:
        tables.plot_positions(rows, plot)
    for what, path in (("rows", json_path), ("plot", plot), ("token losses", tokens_path)):
        if path:
            out.print(f"{what}: {path}", highlight=False, soft_wrap=True)

"""`longlora longqa`: long-document question answering data, built and described."""

from __future__ import annotations

import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from longlora_plugin.cli.options import json_option, options_of
from longlora_plugin.cli.output import Output
from longlora_plugin.longqa.documents import Limits
from longlora_plugin.longqa.endpoint import Requests
from longlora_plugin.longqa.settings import Settings

if TYPE_CHECKING:
    from longlora_plugin.longqa.settings import Report
    from longlora_plugin.longqa.stats import Statistics

FILE = click.Path(dir_okay=False, path_type=Path)
Kind = TypeVar("Kind", Settings, Limits, Requests)
SHARE = click.FloatRange(0, 1, max_open=True)
POSITIVE = click.IntRange(min=1)


@click.group(name="longqa")
def command() -> None:
    """From documents to long question-answer data, and what such data holds."""


@command.command()
@click.argument("source", type=click.Path(exists=True, path_type=Path))
@click.argument("out", type=FILE)
@click.option("--tokenizer", required=True, help="Folder or name of the model's tokenizer.")
@click.option("--context", required=True, type=POSITIVE, help="Tokens a row may have, as trained.")
@options_of(Settings)
@click.option(
    "--short",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="JSONL or JSON of short instructions to mix in.",
)
@click.option(
    "--short-share", type=SHARE, help="Share of short rows.  [default with --short: 0.25]"
)
@options_of(Limits)
@click.option("--model", help="Model at the endpoint.")
@options_of(Requests)
@click.option("--dry-run", is_flag=True, help="Say what would be asked and cost; write nothing.")
@click.option("--strict", is_flag=True, help="Exit with 3 where a document was skipped.")
@json_option("Write the report as JSON.")
def build(source: Path, out: Path, **options: Any) -> None:
    """Build OUT (.jsonl) from SOURCE, a document or a folder of them.

    Without --base-url the questions are made from the text itself. Give the same command again to
    go on after any interruption.

    Exit codes: 0 finished; 1 no pairs; 2 wrong options; 3 some requests failed (or, with --strict,
    documents were skipped); 4 the endpoint is of no use; 5 the budget is used up; 6 the disk is
    full or a file cannot be written; 130 interrupted. What was finished is always kept.
    """
    output = Output(options["json_path"])
    try:
        report = _build(source, out, options, output)
    except (ValueError, FileNotFoundError) as error:
        raise click.UsageError(str(error)) from error
    _show_report(output, report, source, out, dry_run=options["dry_run"])
    output.write_json(vars(report), "report")
    exit_code = report.exit_code
    if options["strict"] and report.skipped and exit_code == 0:
        exit_code = 3
    sys.exit(exit_code)


def _build(source: Path, out: Path, options: dict[str, Any], output: Output) -> Report:
    from longlora_plugin.longqa.build import Builder
    from longlora_plugin.longqa.endpoint import Endpoint
    from longlora_plugin.longqa.reader import Reader
    from longlora_plugin.longqa.row_files import read_short

    if (options["base_url"] is None) != (options["model"] is None):
        raise ValueError("--base-url and --model go together; give both, or neither")
    if options["max_tokens"] is not None and options["base_url"] is None:
        raise ValueError("--max-tokens is about a model; add --base-url, --model")
    if options["short_share"] is not None and options["short"] is None:
        raise ValueError("--short-share needs --short FILE, the short instructions")
    if options["short_share"] is None:
        options["short_share"] = 0.25 if options["short"] else 0.0
    settings, limits = _pick(Settings, options), _pick(Limits, options)
    endpoint = None
    if options["model"]:
        endpoint = Endpoint(_pick(Requests, options), options["model"], settings.answer_tokens)
    short = read_short(options["short"]) if options["short"] else []
    tokenizer = _load_tokenizer(options["tokenizer"])
    with Reader(limits) as reader, output.errors.status("reading") as status:
        builder = Builder(
            source,
            out,
            settings,
            tokenizer=tokenizer,
            reader=reader,
            endpoint=endpoint,
            short=short,
        )
        builder.notify = lambda report: status.update(_progress(report))
        return builder.dry_run() if options["dry_run"] else builder.run()


def _pick(kind: type[Kind], options: dict[str, Any]) -> Kind:
    return kind(**{field.name: options[field.name] for field in fields(kind)})


def _load_tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:
        first = str(error).strip().split("\n")[0]
        raise ValueError(
            f"--tokenizer {name}: no tokenizer there ({first}); give a folder with tokenizer.json, "
            "or the name of a model"
        ) from None


def _progress(report: Report) -> str:
    pairs = report.pairs.total()
    waiting = ", waiting for replies under way (Ctrl-C drops them)" if report.stopped else ""
    return f"{report.documents} documents, {report.windows} windows, {pairs} pairs{waiting}"


def _show_report(output: Output, report: Report, source: Path, out: Path, *, dry_run: bool) -> None:
    from rich.markup import escape

    rows = {"documents": report.documents, "windows": report.windows}
    if dry_run:
        rows["windows to build"] = report.to_ask
        if any(report.tokens):
            rows["prompt tokens"], rows["completion tokens, at most"] = report.tokens
    rows |= {f"pairs: {name}": number for name, number in report.pairs.items()}
    rows |= {f"  task {name}": number for name, number in report.tasks.items()}
    rows |= {f"dropped: {name}": number for name, number in report.dropped.items()}
    if report.left_out:
        rows["sentences longer than a window, left out"] = report.left_out
    if any(report.tokens) and not dry_run:
        rows["tokens spent"] = sum(report.tokens)
    title = "longqa build (dry run)" if dry_run else "longqa build"
    output.figures(title, {name: f"{number:,}" for name, number in rows.items()})
    for name, why in report.skipped.items():
        output.print(f"[yellow]skipped[/] {escape(name)}: {escape(why)}")
    for name, earlier in report.duplicates.items():
        output.print(f"[yellow]skipped[/] {escape(name)}: nearly the same as {escape(earlier)}")
    for name, why in report.barren.items():
        output.print(f"[yellow]no pairs[/] from {escape(name)}: {escape(why)}")
    for why, number in report.failed.items():
        output.print(f"[red]{number} requests failed[/]: {escape(why)}")
    if report.stopped:
        click.echo(f"Stopped: {report.stopped}", err=True)
    elif not dry_run and not report.pairs.total():
        click.echo(
            "No pairs: no document gave a question; the lines above say why for each"
            if report.skipped or report.barren or report.duplicates
            else f"No pairs: there is no document in {source}",
            err=True,
        )
    elif report.failed:
        click.echo("Incomplete: give the same command again to ask for what failed", err=True)
    if not dry_run and report.pairs.total():
        output.print(
            f"{escape(str(out))} holds {report.pairs['train'] + report.pairs['short']:,} rows"
        )


@command.command()
@click.argument("files", nargs=-1, required=True, type=FILE)
@click.option("--tokenizer", help="Measure with it; default: lengths recorded by the build.")
@click.option("--sequence-len", type=POSITIVE, help="The recipe's, to count longer pairs.")
@json_option("Write the figures as JSON.")
@click.option("--plot", type=FILE, help="Draw lengths and depths to this PNG.")
def stats(
    files: tuple[Path, ...],
    tokenizer: str | None,
    sequence_len: int | None,
    json_path: str | None,
    plot: Path | None,
) -> None:
    """Describe LongQA or LongAlpaca FILES: pairs, kinds, lengths, warnings."""
    from longlora_plugin.longqa.stats import OfFiles, describe, draw, summarize

    output = Output(json_path)
    loaded = _load_tokenizer(tokenizer) if tokenizer else None
    every, damaged, alone = [], {}, []
    for path in files:
        rows, bad = describe(path, loaded)
        every += rows
        damaged.update(bad)
        alone.append(summarize(rows, bad, sequence_len=sequence_len))
    total = summarize(every, damaged, sequence_len=sequence_len)
    _show_stats(output, total)
    by_file = [{"file": str(path), **vars(one)} for path, one in zip(files, alone, strict=True)]
    output.write_json(vars(OfFiles(**vars(total), by_file=by_file)))
    if plot:
        if not every:
            raise ValueError("there are no pairs to draw")
        draw(every, plot, sequence_len=sequence_len)


def _show_stats(output: Output, total: Statistics) -> None:
    from rich.markup import escape

    rows = {"pairs": f"{total.pairs:,}", "documents": f"{total.documents:,}"}
    rows |= {f"kind {kind}": f"{pairs:,}" for kind, pairs in total.kinds.items()}
    rows |= {f"task {name}": f"{number:,}" for name, number in total.tasks.items()}
    rows |= {f"{total.unit}, {name}": f"{each:,.0f}" for name, each in total.lengths.items()}
    rows |= {f"above {int(size):,} tokens": f"{part:.1%}" for size, part in total.above.items()}
    output.figures("longqa stats", rows)
    for warning in total.warnings:
        output.print(f"[yellow]warning[/] {escape(warning)}")

"""`axolotl longlora longqa`: long-document question answering data, built and described."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from longlora_plugin.longqa.settings import Report
    from longlora_plugin.longqa.stats import Statistics

FILE = click.Path(dir_okay=False, path_type=Path)
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
@click.option("--seed", default=0, show_default=True, help="Of every choice.")
@click.option(
    "--layout",
    type=click.Choice(["alpaca", "chat"]),
    default="alpaca",
    show_default=True,
    help="instruction and output, or messages.",
)
@click.option("--questions", type=POSITIVE, help="Pairs for each window.  [default: 6]")
@click.option("--task", "tasks", multiple=True, help="Only this task; may be repeated.")
@click.option(
    "--kind",
    type=click.Choice(["paper", "book", "report", "code"]),
    help="Of every document; default: judged for each.",
)
@click.option("--encoding", help="Of text files that are not UTF-8; default: detected.")
@click.option("--language", default="en", show_default=True, help="ISO 639 code, for sentences.")
@click.option(
    "--validation-share",
    type=SHARE,
    default=0.0,
    show_default=True,
    help="Share of documents set apart; their rows go to OUT.validation.jsonl.",
)
@click.option(
    "--short",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="JSONL or JSON of short instructions to mix in.",
)
@click.option(
    "--short-share", type=SHARE, help="Share of short rows.  [default with --short: 0.25]"
)
@click.option(
    "--near-duplicates",
    type=click.FloatRange(0.3, 2),
    help="Similarity from which two pairs count as one; above 1: keep all.  [default: 0.8]",
)
@click.option("--max-file-mb", type=float, help="Larger files are skipped.  [default: 64]")
@click.option("--read-seconds", type=float, help="Limit for parsing one file.  [default: 120]")
@click.option("--base-url", help="OpenAI-compatible endpoint, up to /v1; without it no model.")
@click.option("--model", help="Model at the endpoint.")
@click.option(
    "--api-key-env",
    metavar="NAME",
    help="Environment variable that holds the API key.  [default: OPENAI_API_KEY]",
)
@click.option(
    "--concurrency", type=POSITIVE, default=4, show_default=True, help="Requests at once."
)
@click.option(
    "--retries",
    type=click.IntRange(min=0),
    default=5,
    show_default=True,
    help="After time-outs, 429 and 5xx, with back-off.",
)
@click.option("--timeout", type=float, default=300, show_default=True, help="Seconds for a reply.")
@click.option("--temperature", type=float, default=0.7, show_default=True)
@click.option("--answer-tokens", type=POSITIVE, help="Longest answer.  [default: 300]")
@click.option(
    "--evidence-edits",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Characters by which a quote may differ from the document.",
)
@click.option("--max-tokens", type=POSITIVE, help="Budget: tokens of all requests of all runs.")
@click.option("--max-cost", type=float, help="Budget in money; needs both prices.")
@click.option("--price-prompt", type=float, help="Price of a million prompt tokens.")
@click.option("--price-completion", type=float, help="Price of a million completion tokens.")
@click.option("--dry-run", is_flag=True, help="Say what would be asked and cost; write nothing.")
@click.option("--strict", is_flag=True, help="Exit with 3 where a document was skipped.")
@click.option("--json", "json_path", type=FILE, help="Write the report here.")
def build(source: Path, out: Path, **options: Any) -> None:
    """Build OUT (.jsonl) from SOURCE, a document or a folder of them.

    Without --base-url the questions are made from the text itself. Give the same command again to
    go on after any interruption.

    Exit codes: 0 finished; 1 no pairs; 2 wrong options; 3 some requests failed (or, with --strict,
    documents were skipped); 4 the endpoint is of no use; 5 the budget is used up; 6 the disk is
    full or a file cannot be written; 130 interrupted. What was finished is always kept.
    """
    try:
        report = _build(source, out, options)
    except (ValueError, FileNotFoundError) as error:
        raise click.UsageError(str(error)) from error
    _show_report(report, out, dry_run=options["dry_run"])
    if options["json_path"]:
        _write_json(options["json_path"], report.as_json())
    exit_code = report.exit_code
    if options["strict"] and report.skipped and exit_code == 0:
        exit_code = 3
    sys.exit(exit_code)


def _build(source: Path, out: Path, options: dict[str, Any]) -> Report:
    from longlora_plugin.longqa import endpoint as endpoints
    from longlora_plugin.longqa.build import Builder
    from longlora_plugin.longqa.documents import Reader
    from longlora_plugin.longqa.settings import Settings
    from longlora_plugin.longqa.short import read_short

    if (options["base_url"] is None) != (options["model"] is None):
        raise ValueError("--base-url and --model go together; give both, or neither")
    for name in ("max_tokens", "max_cost", "api_key_env"):
        if options[name] is not None and options["base_url"] is None:
            raise ValueError(
                f"--{name.replace('_', '-')} is about a model; add --base-url, --model"
            )
    if options["short_share"] is not None and options["short"] is None:
        raise ValueError("--short-share needs --short FILE, the short instructions")
    if options["short"] and options["short_share"] is None:
        options["short_share"] = 0.25
    chosen = {
        "questions": options["questions"],
        "tasks": tuple(options["tasks"]) or None,
        "short_share": options["short_share"],
        "answer_tokens": options["answer_tokens"],
        "similar": options["near_duplicates"],
    }
    settings = Settings(
        **{name: options[name] for name in ("context", "seed", "layout", "kind", "language")},
        **{name: options[name] for name in ("validation_share", "model", "evidence_edits")},
        **{name: value for name, value in chosen.items() if value is not None},
    )
    limits = {
        "max_file_mb": options["max_file_mb"],
        "seconds": options["read_seconds"],
        "encoding": options["encoding"],
    }
    endpoint = budget = None
    if options["base_url"]:
        budget = endpoints.Budget(
            max_tokens=options["max_tokens"],
            max_cost=options["max_cost"],
            prices=endpoints.Prices(options["price_prompt"], options["price_completion"]),
        )
        endpoint = endpoints.Endpoint(
            options["base_url"],
            options["model"],
            key=endpoints.read_key(options["api_key_env"]),
            seconds=options["timeout"],
            retries=options["retries"],
            temperature=options["temperature"],
            answer_tokens=settings.answer_tokens,
        )
    short = read_short(options["short"]) if options["short"] else []
    tokenizer = _load_tokenizer(options["tokenizer"])
    with (
        Reader(**{name: value for name, value in limits.items() if value is not None}) as reader,
        _Progress() as notify,
    ):
        builder = Builder(
            source,
            out,
            settings,
            tokenizer=tokenizer,
            reader=reader,
            endpoint=endpoint,
            budget=budget,
            concurrency=options["concurrency"],
            short=short,
            notify=notify,
        )
        return builder.dry_run() if options["dry_run"] else builder.run()


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


class _Progress:
    """A progress line that is fed with reports, on the terminal only."""

    def __enter__(self) -> Any:
        from rich.console import Console
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        self.bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self.bar.start()
        self.task = self.bar.add_task("reading")
        return self._update

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def _update(self, report: Report) -> None:
        pairs = report.pairs.total()
        waiting = ", waiting for replies under way (Ctrl-C drops them)"
        self.bar.update(
            self.task,
            description=f"{report.documents} documents, {report.windows} windows, {pairs} pairs"
            + (waiting if report.stopped else ""),
        )


def _show_report(report: Report, out: Path, *, dry_run: bool) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    table = Table(title=f"longqa build {'(dry run)' if dry_run else ''}", title_justify="left")
    table.add_column("what")
    table.add_column("how many", justify="right")
    table.add_row("documents", f"{report.documents:,}")
    table.add_row("windows", f"{report.windows:,}")
    if dry_run:
        table.add_row("windows to build", f"{report.to_ask:,}")
        if any(report.tokens):
            table.add_row("prompt tokens", f"{report.tokens[0]:,}")
            table.add_row("completion tokens, at most", f"{report.tokens[1]:,}")
            said = "give --price-prompt, --price-completion"
            cost = report.cost
            table.add_row("cost, at most", said if cost is None else f"{cost:,.4f}")
    for name, number in report.pairs.items():
        table.add_row(f"pairs: {name}", f"{number:,}")
    for name, number in report.tasks.items():
        table.add_row(f"  task {name}", f"{number:,}")
    for name, number in report.dropped.items():
        table.add_row(f"dropped: {name}", f"{number:,}")
    if report.left_out:
        table.add_row("sentences longer than a window, left out", f"{report.left_out:,}")
    if any(report.tokens) and not dry_run:
        table.add_row("tokens spent", f"{sum(report.tokens):,}")
        if report.cost is not None:
            table.add_row("cost", f"{report.cost:,.4f}")
    console.print(table)
    for name, why in report.skipped.items():
        console.print(f"[yellow]skipped[/] {escape(name)}: {escape(why)}", highlight=False)
    for name, twin in report.duplicates.items():
        console.print(f"[yellow]skipped[/] {escape(name)}: nearly the same as {escape(twin)}")
    for why, number in report.failed.items():
        console.print(f"[red]{number} requests failed[/]: {escape(why)}", highlight=False)
    if report.stopped:
        click.echo(f"Stopped: {report.stopped}", err=True)
    elif not dry_run and not report.pairs.total():
        click.echo(
            "No pairs: no document gave a question; see what was skipped and dropped above",
            err=True,
        )
    elif report.failed:
        click.echo("Incomplete: give the same command again to ask for what failed", err=True)
    if not dry_run and report.pairs.total():
        console.print(
            f"{escape(str(out))} holds {report.pairs['train'] + report.pairs['short']:,} rows",
            highlight=False,
        )


@command.command()
@click.argument("files", nargs=-1, required=True, type=FILE)
@click.option("--tokenizer", help="Measure with it; default: lengths recorded by the build.")
@click.option("--sequence-len", type=POSITIVE, help="Of the recipe that will train on this.")
@click.option("--json", "json_path", type=FILE, help="Write the figures here.")
@click.option("--plot", type=FILE, help="Draw lengths and depths to this PNG.")
def stats(
    files: tuple[Path, ...],
    tokenizer: str | None,
    sequence_len: int | None,
    json_path: Path | None,
    plot: Path | None,
) -> None:
    """Describe LongQA or LongAlpaca FILES: pairs, kinds, lengths, warnings."""
    from longlora_plugin.longqa.stats import describe, draw, summarize

    loaded = _load_tokenizer(tokenizer) if tokenizer else None
    every, damaged, alone = [], {}, []
    for path in files:
        rows, bad = describe(path, loaded)
        every += rows
        damaged.update(bad)
        alone.append(summarize(rows, bad, sequence_len=sequence_len))
    total = summarize(every, damaged, sequence_len=sequence_len)
    _show_stats(total)
    if json_path:
        per_file = [
            {"file": str(path), **one.as_json()} for path, one in zip(files, alone, strict=True)
        ]
        _write_json(json_path, {**total.as_json(), "by_file": per_file})
    if plot:
        if not every:
            raise ValueError("there are no pairs to draw")
        draw(every, plot, sequence_len=sequence_len)


def _show_stats(total: Statistics) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    table = Table(title="longqa stats", title_justify="left")
    table.add_column("what")
    table.add_column("value", justify="right")
    table.add_row("pairs", f"{total.pairs:,}")
    table.add_row("documents", f"{total.documents:,}")
    for kind, pairs in total.kinds.items():
        table.add_row(f"kind {kind}", f"{pairs:,}")
    for name, number in total.tasks.items():
        table.add_row(f"task {name}", f"{number:,}")
    for name, length in total.lengths.items():
        table.add_row(f"{total.unit}, {name}", f"{length:,.0f}")
    for size, share in total.above.items():
        table.add_row(f"above {int(size):,} tokens", f"{share:.1%}")
    console.print(table)
    for warning in total.warnings:
        console.print(f"[yellow]warning[/] {escape(warning)}", highlight=False)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise click.ClickException(f"{path} cannot be written: {error.strerror}") from None

"""`longlora recipes`: list, show, start from, check; the block's JSON Schema."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from longlora_plugin.checkpoints.files import as_json
from longlora_plugin.cli.options import json_option
from longlora_plugin.cli.output import Output

if TYPE_CHECKING:
    from longlora_plugin.recipes.check import Report


@click.group("recipes")
def command() -> None:
    """Recipes to start from, and a check of any recipe."""


WIDE = 120
"""Columns of a terminal on which the list has the base model, which the summary names as well."""


@command.command("list")
@json_option("Write the list as JSON.")
def list_recipes(json_path: str | None) -> None:
    """Recipes of this package and of installed ones."""
    from rich.table import Table

    from longlora_plugin.recipes import ListedRow, available
    from longlora_plugin.run.recipe import read_yaml

    out = Output(json_path)
    rows: list[ListedRow] = []
    for name, listed in sorted(available().items()):
        raw = read_yaml(listed.path)
        row: ListedRow = {
            "name": name,
            "path": str(listed.path),
            "base_model": str(raw.get("base_model")),
            "sequence_len": raw.get("sequence_len"),
            "summary": listed.summary,
            "from": listed.owner,
        }
        rows.append(row)
    columns = {"name": "name", "sequence_len": "context", "summary": "what"}
    if out.console.width >= WIDE:
        columns |= {"base_model": "base model"}
    if len({row["from"] for row in rows}) > 1:
        columns |= {"from": "from"}
    table = Table(*columns.values())
    for row in rows:
        table.add_row(*(str(dict(row)[key]) for key in columns))
    out.table(table)
    out.print("Start from one: longlora recipes init NAME")
    out.write_json(rows)


@command.command()
@click.argument("name")
def show(name: str) -> None:
    """Print recipe NAME."""
    click.echo(_path_of(name).read_text(encoding="utf-8"), nl=False)


@command.command()
@click.argument("name", required=False)
@click.option(
    "--from",
    "run",
    metavar="RUN",
    help="Start from what somebody trained: a folder of a run or merged model, or a model on the "
    "Hugging Face hub, that has a longlora.json.",
)
@click.option(
    "--set",
    "settings",
    metavar="KEY=VALUE",
    multiple=True,
    help="Change or add a value, e.g. --set sequence_len=65536 --set longlora.rope=yarn.",
)
@click.option("--output", metavar="FILE", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--force", is_flag=True, help="Overwrite FILE.")
def init(
    name: str | None, run: str | None, settings: tuple[str, ...], output: Path | None, force: bool
) -> None:
    """Write recipe NAME to a file of your own (NAME.yml), its comments kept."""
    from longlora_plugin.recipes.start import start_from, start_from_run

    if (name is None) == (run is None):
        raise click.UsageError("write the NAME of a listed recipe, or --from RUN")
    source = None if name is None else _path_of(name)
    target = output or Path(f"{name or Path(str(run)).resolve().name}.yml")
    if target.exists() and not force:
        raise click.UsageError(f"{target} exists; write --force, or another --output")
    try:
        if source is None:
            left_out = start_from_run(str(run), target, list(settings))
            written = [target]
        else:
            left_out, written = [], start_from(source, target, list(settings))
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    for path in written:
        click.echo(f"wrote {path}")
    if left_out:
        click.echo(f"left out, of that run alone: {', '.join(left_out)}")
    click.echo(f"next: longlora recipes check {target}")


@command.command()
@click.argument(
    "files",
    nargs=-1,
    required=True,
    metavar="FILE…",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
)
@click.option("--gpu", metavar="NAME", help="Must fit this GPU: a100-80gb, …, or a size: 48gb.")
@click.option("--gpus", type=click.IntRange(min=1), default=1, show_default=True)
@click.option(
    "--base-config",
    metavar="FOLDER",
    help="Take the base model's config.json from here (where the hub cannot be reached).",
)
@click.option("--strict", is_flag=True, help="Warnings are problems.")
@json_option("Write the findings as JSON.")
@click.pass_context
def check(
    ctx: click.Context,
    files: tuple[Path, ...],
    gpu: str | None,
    gpus: int,
    base_config: str | None,
    strict: bool,
    json_path: str | None,
) -> None:
    """Check recipes as Axolotl and LongLoRA will see them; loads no model.

    Says everything that is wrong at once. Exit status: 0 all are right, 1 something is wrong, 2
    wrong usage. A base model that cannot be reached is a note, not a problem.
    """
    from rich.progress import track

    from longlora_plugin.plan.gpus import find_gpu
    from longlora_plugin.recipes import CheckedRow
    from longlora_plugin.recipes.check import check_recipe

    if gpu:
        try:
            find_gpu(gpu)
        except ValueError as error:
            raise click.UsageError(str(error)) from None
    out = Output(json_path)
    progress = out.errors
    reports = [
        check_recipe(path, gpu=gpu, gpus=gpus, base_config=base_config, strict=strict)
        for path in track(
            files, "checking", console=progress, transient=True, disable=not progress.is_terminal
        )
    ]
    for report in reports:
        _print_report(report, err=out.is_piped)
    columns = CheckedRow.__annotations__
    out.write_json([{key: getattr(report, key) for key in columns} for report in reports])
    ctx.exit(0 if all(report.ok for report in reports) else 1)


@command.command()
@click.option("--output", metavar="FILE", help="Write to a file instead of the terminal.")
def schema(output: str | None) -> None:
    """JSON Schema of Axolotl's keys and the longlora: block, for editors."""
    from longlora_plugin.recipes.schema import recipe_schema

    text = as_json(recipe_schema())
    if output is None:
        click.echo(text, nl=False)
        return
    Path(output).write_text(text, encoding="utf-8")
    click.echo(f"wrote {output}; first line of a recipe: # yaml-language-server: $schema={output}")


def _path_of(name: str) -> Path:
    from longlora_plugin.recipes import recipe_path

    try:
        return recipe_path(name)
    except ValueError as error:
        raise click.UsageError(str(error)) from None


def _print_report(report: Report, *, err: bool) -> None:
    count = len(report.problems)
    verdict = "ok" if report.ok else f"{count} problem{'s' * (count != 1)}"
    click.secho(f"{report.path}: {verdict}", fg="green" if report.ok else "red", bold=True, err=err)
    for text in report.problems:
        click.echo("  ✗ " + text.replace("\n", "\n    "), err=err)
    for text in report.warnings:
        click.secho("  ! " + text.replace("\n", "\n    "), fg="yellow", err=err)
    for text in report.notes:
        click.echo("  · " + text.replace("\n", "\n    "), err=err)
    for fact in report.facts:
        click.echo(f"  → {fact}", err=err)

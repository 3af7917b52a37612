"""`longlora doctor`: what this machine and these versions support."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from longlora_plugin.cli.options import json_option
from longlora_plugin.cli.output import Output

if TYPE_CHECKING:
    from longlora_plugin.doctor import Diagnosis

COLOURS = {"works": "green", "fails": "red", "missing": "yellow", "not tried": "yellow"}


@click.command("doctor")
@click.argument("recipe", required=False, type=click.Path(dir_okay=False, path_type=Path))
@click.option("--quick", is_flag=True, help="Leave out what starts processes or compiles kernels.")
@json_option("Write everything as JSON.")
def command(recipe: Path | None, quick: bool, json_path: str | None) -> None:
    """Versions, device, and which attention back ends, quantizations and launchers work here.

    Each is tried. With RECIPE also what will be on, what will be off, and why; the exit status is
    1 where the recipe cannot run here.
    """
    from longlora_plugin.doctor import diagnose

    out = Output(json_path)
    with out.errors.status("starting") as status:
        diagnosis = diagnose(
            recipe, quick=quick, progress=lambda name: status.update(f"trying {name}")
        )
    _print(out, diagnosis)
    out.write_json(asdict(diagnosis))
    if diagnosis.problems:
        raise SystemExit(1)


def _print(out: Output, diagnosis: Diagnosis) -> None:
    from rich.markup import escape
    from rich.table import Table

    known = (f"{name} {value}" for name, value in diagnosis.versions.items() if value)
    out.print(", ".join(known))
    absent = [name for name, value in diagnosis.versions.items() if not value]
    if absent:
        out.print(f"not installed: {', '.join(absent)}")
    device = diagnosis.device
    memory = f", {device['memory']} GiB each" if device["memory"] else ""
    out.print(
        f"device: {device['count']} × {device['name']} ({device['kind']}{memory})",
    )
    table = Table("tried", "", "what was seen", title="This machine", title_justify="left")
    for trial in diagnosis.trials:
        colour = COLOURS[trial.state]
        table.add_row(trial.name, f"[{colour}]{trial.state}[/]", escape(trial.detail))
    out.table(table)
    if diagnosis.findings:
        table = Table("what", "", "how, or why not", title=diagnosis.recipe, title_justify="left")
        for found in diagnosis.findings:
            word = "[green]on[/]" if found.on else "[yellow]off[/]"
            table.add_row(found.what, word, escape(found.why))
        out.table(table)
    for note in diagnosis.notes:
        out.print(f"[yellow]note:[/] {escape(note)}")
    for problem in diagnosis.problems:
        out.print(f"[red]problem:[/] {escape(problem)}")
    if diagnosis.recipe:
        verdict = "cannot run here" if diagnosis.problems else "can run here"
        out.print(f"{diagnosis.recipe} {verdict}")

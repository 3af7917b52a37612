"""The study: ``python benchmarks/study run`` trains what is missing, ``… report`` writes the page.

Does LongLoRA's recipe do at a small scale what the paper says, and what repairs it where it does
not? Each run is one JSON file in OUT/rows; a run that is there is not made again, so the study can
be stopped at any time and goes on where it was, also in several processes at once.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import click
from plan import runs
from settings import Settings

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
BUNDLED = REPOSITORY / "examples/quickstart/model"


@click.group(help=__doc__)
@click.option("--out", type=click.Path(path_type=Path), default=Path("outputs/study"))
@click.option(
    "--text",
    type=click.Path(path_type=Path),
    default=Path("outputs/quickstart/text"),
    help="Folder that examples/quickstart/text.py wrote.",
)
@click.pass_context
def study(context: click.Context, out: Path, text: Path) -> None:
    context.obj = (out, text)


@study.command()
@click.option("--minutes", type=float, help="Start no run after so many minutes.")
@click.option("--only", help="Runs whose name holds this.")
@click.option("--threads", type=int, default=1, show_default=True)
@click.pass_obj
def run(where: tuple[Path, Path], minutes: float | None, only: str | None, threads: int) -> None:
    """Make the runs that are missing, the most telling ones first."""
    import torch

    torch.set_num_threads(threads)
    out, text = where
    rows = out / "rows"
    rows.mkdir(parents=True, exist_ok=True)
    wanted = [settings for settings in runs() if (only or "") in settings.key]
    started = time.monotonic()
    for settings in wanted:
        path = rows / f"{settings.key}.json"
        if path.exists() or not _claim(path):
            continue
        if minutes is not None and time.monotonic() - started > 60 * minutes:
            _unclaim(path)
            break
        try:
            _make(settings, path, text)
        finally:
            _unclaim(path)
    missing = sum(not (rows / f"{settings.key}.json").exists() for settings in wanted)
    click.echo(f"{len(wanted) - missing} of {len(wanted)} runs are there")


@study.command()
@click.argument("folder", type=click.Path(path_type=Path), required=False)
@click.pass_obj
def report(where: tuple[Path, Path], folder: Path | None) -> None:
    """Print the tables and write the page with its plots to FOLDER (default: OUT)."""
    from report import show, write_page
    from results import Results

    out, _ = where
    results = Results(out / "rows")
    show(results)
    click.echo(
        f"page: {write_page(results, folder or out, (HERE / 'introduction.md').read_text())}"
    )


def _make(settings: Settings, path: Path, text: Path) -> None:
    import train

    started = time.monotonic()
    row = {"settings": settings.as_dict(), **train.run(settings, BUNDLED, _books(text))}
    _write(path, row)
    click.echo(
        f"{settings.key}: perplexity {row['perplexity']:.2f} "
        f"{row.get('retrieval', {}).get('accuracy', '')} {time.monotonic() - started:.0f} s"
    )


@functools.cache
def _books(text: Path) -> Any:
    from data import Books
    from transformers import AutoTokenizer

    return Books.read(AutoTokenizer.from_pretrained(BUNDLED), text)


def _claim(path: Path) -> bool:
    """Whether this process may make the run; a claim of a process that is gone is void."""
    claim = path.with_suffix(".claim")
    while True:
        try:
            with claim.open("x") as file:
                file.write(str(os.getpid()))
            return True
        except FileExistsError:
            try:
                os.kill(int(claim.read_text() or 0), 0)
                return False
            except (ProcessLookupError, ValueError):
                claim.unlink(missing_ok=True)


def _unclaim(path: Path) -> None:
    path.with_suffix(".claim").unlink(missing_ok=True)


def _write(path: Path, row: dict) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(row, indent=1) + "\n")
    part.replace(path)


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    study()

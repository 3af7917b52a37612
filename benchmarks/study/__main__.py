"""The study: ``python benchmarks/study run`` makes what is missing, ``… report`` writes the page.

Does LongLoRA's recipe do at a small scale what the paper says, and what repairs it where it does
not? Each run is one JSON file in OUT/rows; a run that is there is not made again, so the study can
be stopped at any time and goes on where it was.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import click
from plan import runs
from settings import Settings

HERE = Path(__file__).parent
BUNDLED = HERE.parents[1] / "examples/quickstart/model"


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
@click.option("--only", default="", help="Runs whose name holds this.")
@click.option("--quick", is_flag=True, help="The main rows with one seed: 20 minutes on 2 cores.")
@click.option(
    "--processes",
    type=click.IntRange(1),
    default=os.cpu_count() or 1,
    show_default="one a core",
    help="Runs at a time, of one thread each.",
)
@click.pass_obj
def run(
    where: tuple[Path, Path], minutes: float | None, only: str, quick: bool, processes: int
) -> None:
    """Make the runs that are missing, the most telling ones first."""
    out, text = where
    if not (text / "train.jsonl").is_file():
        raise click.ClickException(
            f"{text}/train.jsonl is missing; write it with "
            f"python examples/quickstart/text.py {text}"
        )
    rows = out / "rows"
    rows.mkdir(parents=True, exist_ok=True)
    wanted = [settings for settings in runs(quick=quick) if only in settings.key]
    missing = [settings for settings in wanted if not _file(rows, settings).exists()]
    if any(settings.task == "retrieval" for settings in missing):
        _base_model("retrieval", out, text)  # before the processes start: it is made once
    until = None if minutes is None else time.monotonic() + 60 * minutes
    workers = [
        multiprocessing.get_context("spawn").Process(target=work, args=(missing, out, text, until))
        for _ in range(min(processes, len(missing)))
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    there = sum(_file(rows, settings).exists() for settings in wanted)
    click.echo(f"{there} of {len(wanted)} runs are there, in {rows}")
    if any(worker.exitcode for worker in workers):
        raise click.ClickException("a process failed, see above; run again to go on")


@study.command("time")
@click.pass_obj
def time_steps(where: tuple[Path, Path]) -> None:
    """Time a step with full attention, S²-Attn and its groups alternately, in one process."""
    import torch
    from timing import alternate

    out, text = where
    torch.set_num_threads(1)
    timed = alternate(BUNDLED, _books(text))
    _write(out / "timing.json", timed)
    click.echo(json.dumps(timed, indent=1))


@study.command()
@click.argument("folder", type=click.Path(path_type=Path), required=False)
@click.pass_obj
def report(where: tuple[Path, Path], folder: Path | None) -> None:
    """Print the tables and write the page with its plots to FOLDER (default: OUT)."""
    from report import show, write_page
    from results import Results

    out, _ = where
    results = Results(out)
    show(results)
    click.echo(f"page: {write_page(results, folder or out)}")


def work(missing: list[Settings], out: Path, text: Path, until: float | None) -> None:
    """Make those of the runs that no other process makes."""
    import torch

    torch.set_num_threads(1)
    for settings in missing:
        path = _file(out / "rows", settings)
        if until is not None and time.monotonic() > until:
            return
        if path.exists() or not _claim(path):
            continue
        try:
            if not path.exists():
                _make(settings, path, out, text)
        finally:
            path.with_suffix(".claim").unlink(missing_ok=True)


def _make(settings: Settings, path: Path, out: Path, text: Path) -> None:
    import train

    started = time.monotonic()
    model_dir = _base_model(settings.task, out, text)
    row = {"settings": settings.as_dict(), **train.run(settings, model_dir, _books(text))}
    _write(path, row)
    found = f", passkey digits {row['retrieval']['digits']}" if "retrieval" in row else ""
    click.echo(
        f"{settings.key}: perplexity {row['perplexity']:.2f}{found}, "
        f"{time.monotonic() - started:.0f} s"
    )


@functools.cache
def _books(text: Path) -> Any:
    from data import Books
    from transformers import AutoTokenizer

    return Books.read(AutoTokenizer.from_pretrained(BUNDLED), text)


def _base_model(task: str, out: Path, text: Path) -> Path:
    from base import model_for

    return BUNDLED if task == "books" else model_for(task, BUNDLED, out, _books(text))


def _file(rows: Path, settings: Settings) -> Path:
    return rows / f"{settings.key}.json"


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
            except (ProcessLookupError, OverflowError, ValueError):
                claim.unlink(missing_ok=True)


def _write(path: Path, content: Any) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(path)


if __name__ == "__main__":
    study()

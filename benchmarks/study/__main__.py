"""The study: ``-m benchmarks.study run`` makes what is missing, ``… report`` writes the page.

Does LongLoRA's recipe do at a small scale what the paper says, and what repairs it where it does
not? Each run is one JSON file in OUT/rows; a run that is there is not made again, so the study can
be stopped at any time and goes on where it was.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from pathlib import Path

import click

from benchmarks.study.plan import runs
from benchmarks.study.worker import (
    base_model,
    books_of,
    file_of,
    torch_on_one_thread,
    work,
    write,
)


@click.group(help=__doc__)
@click.option("--out", type=click.Path(path_type=Path), default=Path("outputs/study"))
@click.option(
    "--text",
    type=click.Path(path_type=Path),
    default=Path("outputs/quickstart/text"),
    help="Folder that benchmarks/experiments/quickstart/text.py wrote.",
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
            f"python -m benchmarks.experiments.quickstart.text {text}"
        )
    rows = out / "rows"
    rows.mkdir(parents=True, exist_ok=True)
    wanted = [settings for settings in runs(quick=quick) if only in settings.key]
    missing = [settings for settings in wanted if not file_of(rows, settings).exists()]
    until = None if minutes is None else time.monotonic() + 60 * minutes
    spawn = multiprocessing.get_context("spawn")
    pretrained = sorted({settings.task for settings in missing} - {"books"})
    if pretrained:  # before the runs, so that each base model is made once
        with spawn.Pool(processes, torch_on_one_thread) as pool:
            pool.starmap(base_model, [(task, out, text) for task in pretrained])
    workers = [
        spawn.Process(target=work, args=(missing, out, text, until))
        for _ in range(min(processes, len(missing)))
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    there = sum(file_of(rows, settings).exists() for settings in wanted)
    click.echo(f"{there} of {len(wanted)} runs are there, in {rows}")
    if any(worker.exitcode for worker in workers):
        raise click.ClickException("runs failed, see above; those that are missing are tried again")


@study.command("time")
@click.pass_obj
def time_steps(where: tuple[Path, Path]) -> None:
    """Time a step with full attention and with S²-Attn, alternately, in one process."""
    import torch

    from benchmarks.study.timing import alternate

    out, text = where
    torch.set_num_threads(1)
    timed = alternate(base_model("books", out, text), books_of(text))
    write(out / "timing.json", timed)
    click.echo(json.dumps(timed, indent=1))


@study.command()
@click.argument("folder", type=click.Path(path_type=Path), required=False)
@click.pass_obj
def report(where: tuple[Path, Path], folder: Path | None) -> None:
    """Print the tables and write the page with its plots to FOLDER (default: OUT)."""
    from benchmarks.study.report import show, write_page
    from benchmarks.study.results import Results

    out, _ = where
    results = Results(out)
    show(results)
    click.echo(f"page: {write_page(results, folder or out)}")


if __name__ == "__main__":
    study()

"""One process of the study: it makes the runs that no other process has claimed.

A module of its own because a process that is spawned has to import it.
"""

from __future__ import annotations

import functools
import json
import os
import time
from pathlib import Path
from typing import Any

import click
from settings import Settings

BUNDLED = Path(__file__).parents[2] / "examples/quickstart/model"


def work(missing: list[Settings], out: Path, text: Path, until: float | None) -> None:
    """Make those of the runs that no other process makes."""
    import torch

    torch.set_num_threads(1)
    for settings in missing:
        path = file_of(out / "rows", settings)
        if until is not None and time.monotonic() > until:
            return
        if path.exists() or not claim(path):
            continue
        try:
            if not path.exists():
                _make(settings, path, out, text)
        finally:
            path.with_suffix(".claim").unlink(missing_ok=True)


def _make(settings: Settings, path: Path, out: Path, text: Path) -> None:
    import train

    started = time.monotonic()
    model_dir = base_model(settings.task, out, text)
    row = {"settings": settings.as_dict(), **train.run(settings, model_dir, books_of(text))}
    write(path, row)
    found = f", passkey digits {row['retrieval']['digits']}" if "retrieval" in row else ""
    click.echo(
        f"{settings.key}: perplexity {row['perplexity']:.2f}{found}, "
        f"{time.monotonic() - started:.0f} s"
    )


@functools.cache
def books_of(text: Path) -> Any:
    from data import Books
    from transformers import AutoTokenizer

    return Books.read(AutoTokenizer.from_pretrained(BUNDLED), text)


def base_model(task: str, out: Path, text: Path) -> Path:
    from base import model_for

    return BUNDLED if task == "books" else model_for(task, BUNDLED, out, books_of(text))


def file_of(rows: Path, settings: Settings) -> Path:
    return rows / f"{settings.key}.json"


def claim(path: Path) -> bool:
    """Whether this process may make the run; a claim of a process that is gone is void."""
    mark = path.with_suffix(".claim")
    while True:
        try:
            with mark.open("x") as file:
                file.write(str(os.getpid()))
            return True
        except FileExistsError:
            try:
                os.kill(int(mark.read_text() or 0), 0)
                return False
            except (ProcessLookupError, OverflowError, ValueError):
                mark.unlink(missing_ok=True)


def write(path: Path, content: Any) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(path)

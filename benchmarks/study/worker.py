"""One process of the study: it makes the runs that no other process has claimed.

A module of its own because a process that is spawned has to import it.
"""

from __future__ import annotations

import fcntl
import functools
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from benchmarks.study.settings import Settings

BUNDLED = Path(__file__).parents[2] / "examples/quickstart/model"


def work(missing: list[Settings], out: Path, text: Path, until: float | None) -> None:
    """Make those of the runs that no other process makes.

    Exits with 1 where one of them failed; the others are made all the same.
    """
    torch_on_one_thread()
    parent = os.getppid()
    failed = False
    for settings in missing:
        path = file_of(out / "rows", settings)
        if os.getppid() != parent or (until is not None and time.monotonic() > until):
            break
        with claimed(path) as mine:
            if not mine or path.exists():
                continue
            try:
                _make(settings, path, out, text)
            except Exception:
                failed = True
                click.echo(f"{settings.key} failed:\n{traceback.format_exc()}", err=True)
    sys.exit(failed)


def torch_on_one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def _make(settings: Settings, path: Path, out: Path, text: Path) -> None:
    from benchmarks.study import train

    started = time.monotonic()
    model_dir = base_model(settings.task, out, text)
    books = books_of(text, settings.task)
    row = {"settings": settings.as_dict(), **train.run(settings, model_dir, books)}
    write(path, row)
    asked = row.get("retrieval", {}).get("digits") or row.get("recall", {}).get("by_distance")
    found = f", found {asked}" if asked else ""
    click.echo(
        f"{settings.key}: perplexity {row['perplexity']:.2f}{found}, "
        f"{time.monotonic() - started:.0f} s"
    )


@functools.cache
def books_of(text: Path, task: str = "books") -> Any:
    from transformers import AutoTokenizer

    from benchmarks.study.data import Books
    from benchmarks.study.recall import read_books

    if task == "recall":
        return read_books(text)
    return Books.read(AutoTokenizer.from_pretrained(BUNDLED), text)


def base_model(task: str, out: Path, text: Path) -> Path:
    """Folder of the model that the runs of a task start from."""
    from benchmarks.study.base import retrieval_base
    from benchmarks.study.recall import recall_base

    if task == "books":
        return BUNDLED
    if task == "recall":
        return recall_base(out, books_of(text, task))
    return retrieval_base(BUNDLED, out, books_of(text))


def file_of(rows: Path, settings: Settings) -> Path:
    return rows / f"{settings.key}.json"


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Whether nobody else makes `path` now; the kernel gives the claim of a dead process back."""
    with path.with_suffix(".claim").open("w") as mark:
        try:
            fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def write(path: Path, content: Any) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(path)

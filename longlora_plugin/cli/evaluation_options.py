"""What `eval` and `passkey` share on the command line: list options, model choice, progress."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click


class Integers(click.ParamType):
    """A list of whole numbers, separated by commas; `8k` is 8192."""

    name = "integers"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> list[int]:
        if isinstance(value, list):
            return value
        try:
            return [_whole(part) for part in str(value).split(",") if part.strip()]
        except ValueError:
            self.fail(f"{value!r}: write whole numbers with commas, for example 512,1024 or 8k")


class Depths(click.ParamType):
    """A list of shares between 0 and 1, separated by commas, or `random`."""

    name = "depths"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> list[Any]:
        if isinstance(value, list):
            return value
        parts = [part.strip() for part in str(value).split(",") if part.strip()]
        try:
            return [part if part == "random" else float(part) for part in parts]
        except ValueError:
            self.fail(f"{value!r}: write shares with commas, for example 0,0.5,1, or random")


def _whole(text: str) -> int:
    text = text.strip().lower()
    return int(text[:-1]) * 1024 if text.endswith("k") else int(text)


def model_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--model` and `--adapter`."""
    function = click.option(
        "--adapter",
        metavar="FOLDER",
        help="Trained adapter. Default: the recipe's output_dir.",
    )(function)
    return click.option(
        "--model",
        "models",
        multiple=True,
        metavar="MODEL",
        help="base, base+rope, adapter, trained (full fine-tune), merged, or NAME=FOLDER for any "
        "other model or adapter. Repeatable. Default: all of the first four that exist.",
    )(function)


def rows_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--json` and `--plot`."""
    function = click.option("--plot", metavar="FILE.png", help="Draw the result.")(function)
    return click.option(
        "--json", "json_path", metavar="FILE", help="Write all rows, a list, as they are done."
    )(function)


@contextmanager
def progress_bar(console: Any) -> Iterator[Callable[[str, int, int], None]]:
    """A bar for each thing in progress; call the result with (what, amount done, amount in all)."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        tasks: dict[str, Any] = {}

        def advance(what: str, done: int, total: int) -> None:
            if what not in tasks:
                for finished in tasks.values():
                    progress.update(finished, visible=False)
                tasks[what] = progress.add_task(what, total=total)
            progress.advance(tasks[what], done)

        yield advance

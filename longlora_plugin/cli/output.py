"""One way to print and to write `--json`, for every command.

Tables go to standard output, notes and progress to standard error; with `--json -` standard output
is the JSON alone. Files are tried before the work starts.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

STANDARD_OUTPUT = "-"
PICTURES = (".png", ".svg", ".pdf", ".jpg", ".jpeg", ".webp")
UNLIMITED = 10_000
"""Columns of what is not a terminal: nothing has to fit."""
SPEED_OVER = 3600.0
"""Seconds over which a bar's speed is averaged: lengths take very different times."""


class Output:
    """Where one command prints and writes.

    Args:
        json_path: `--json`; None for no file, `-` for standard output.
        plot: `--plot`.
        quiet: print nothing, as all but one of several processes do.

    Raises:
        ValueError: a file cannot be written.
    """

    def __init__(
        self, json_path: str | None = None, plot: str | None = None, *, quiet: bool = False
    ) -> None:
        from rich.console import Console

        from longlora_plugin.checkpoints.files import check_writable

        self.json_path, self.plot, self.quiet = _expanded(json_path), _expanded(plot), quiet
        if self.plot and Path(self.plot).suffix.lower() not in PICTURES:
            raise ValueError(f"--plot: got {plot}; write a name that ends in {', '.join(PICTURES)}")
        for path in (self.json_path, self.plot):
            if path and path != STANDARD_OUTPUT and not quiet:
                check_writable(Path(path))
        # The stream itself: what redirects standard error for a while leaves progress alone.
        self.errors = Console(file=sys.stderr, quiet=quiet)
        self.console = self.errors if self.is_piped else Console(quiet=quiet)
        if not self.console.is_terminal:
            self.console.width = UNLIMITED

    @property
    def is_piped(self) -> bool:
        """Whether standard output is for the JSON."""
        return self.json_path == STANDARD_OUTPUT

    @property
    def json_file(self) -> str | None:
        """The file of rows, where there is one."""
        return None if self.is_piped else self.json_path

    def print(self, *what: Any, **options: Any) -> None:
        """Print text or tables for people."""
        self.console.print(*what, **({"highlight": False, "soft_wrap": True} | options))

    def table(self, table: Any) -> None:
        """Print a table, nothing of it cut: on a narrow terminal cells go on in the next line."""
        for column in table.columns:
            column.overflow = "fold"
        if self.console.is_terminal:
            from rich.measure import Measurement

            names = [table.columns[0].header, *table.columns[0].cells]
            widest = max(Measurement.get(self.console, self.console.options, n)[1] for n in names)
            table.columns[0].width = min(widest, self.console.width // 2)
        self.console.print(table)

    def figures(self, title: str, rows: Mapping[str, str]) -> None:
        """Print a table of names and figures."""
        from rich.table import Table

        table = Table("what", title=title, title_justify="left")
        table.add_column("value", justify="right")
        for row in rows.items():
            table.add_row(*row)
        self.table(table)

    def note(self, text: str) -> None:
        """Tell what a user should know, on standard error."""
        self.errors.print(f"note: {text}", highlight=False, markup=False, soft_wrap=True)

    def write_json(self, content: Any, what: str = "figures") -> None:
        """Write a whole result to `--json`, if that was asked for."""
        from longlora_plugin.checkpoints.files import as_json, write_text

        if self.json_path is None or self.quiet:
            return
        if self.is_piped:
            print(as_json(content), end="", flush=True)
            return
        write_text(Path(self.json_path), as_json(content))
        self.wrote(what, self.json_path)

    def wrote(self, what: str, path: str | Path | None) -> None:
        """Say where a result is."""
        if path:
            self.print(f"{what}: {path}", markup=False)

    def wrote_files(self) -> None:
        """Say where rows and plot are."""
        self.wrote("rows", self.json_file)
        self.wrote("plot", self.plot)

    @contextmanager
    def progress(self) -> Iterator[Callable[[str, float], None]]:
        """One bar for a whole command; call the result with (what is done now, share of all)."""
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            _end_time_column(),
        )
        with Progress(
            *columns, console=self.errors, transient=True, speed_estimate_period=SPEED_OVER
        ) as bar:
            task = bar.add_task("starting", total=1.0)
            yield lambda what, share: bar.update(task, description=what, completed=share)


def _end_time_column() -> Any:
    from datetime import datetime, timedelta

    from rich.progress import ProgressColumn, Task
    from rich.text import Text

    class EndTimeColumn(ProgressColumn):
        """How long it still takes, and when it ends."""

        max_refresh = 1.0

        def render(self, task: Task) -> Text:
            left = task.time_remaining
            if left is None:
                return Text("ends --:--", style="progress.remaining")
            now = datetime.now()
            end = now + timedelta(seconds=left)
            day = "" if end.date() == now.date() else f"{end:%a} "
            return Text(
                f"{timedelta(seconds=int(left))} left, ends {day}{end:%H:%M}",
                style="progress.remaining",
            )

    return EndTimeColumn()


def _expanded(path: str | None) -> str | None:
    return path if path is None or path == STANDARD_OUTPUT else str(Path(path).expanduser())

"""One loop for `eval`, `passkey` and `bench`: every model, every cell, one row each.

A command says what its cells are and how one is measured; the loop finds out which rows a results
file has already, loads each model once and only where a row is missing, and writes the file after
every row.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from longlora_plugin.evaluation.loading import LoadedModel, ModelSource
from longlora_plugin.evaluation.processes import Processes
from longlora_plugin.evaluation.results import ResultFile, Row, settings_digest

Cell = Mapping[str, Any]
"""What tells one row of a model from another, for example its length."""


class NotMeasurable(Exception):
    """A cell has no row; says why."""


class Experiment:
    """What is measured of every model.

    Attributes:
        question: keys of a row, in addition to the model and the cell, that say what was asked.
    """

    question: Sequence[str] = ()

    def cells(self) -> list[Cell]:
        """The cells of every model."""
        raise NotImplementedError

    def settings(self, source: ModelSource, cell: Cell) -> dict[str, Any]:
        """Everything that decides a row's figures but the model and where it runs."""
        raise NotImplementedError

    def measure(
        self, model: LoadedModel, cell: Cell, progress: Callable[[int, int], None]
    ) -> Mapping[str, object]:
        """The figures of one cell; `rows` has their types.

        Args:
            progress: told the amount just done, and the amount in all.

        Raises:
            NotMeasurable: this cell has no row, the others do.
        """
        raise NotImplementedError

    def keeps(self, settings: str) -> bool:
        """Whether a row of an earlier run with these settings is enough."""
        return True

    def finished(self, row: Row) -> None:
        """Called with each new row, on the main process."""


class Share:
    """The share of a sweep that is done; a row's work grows with its length."""

    def __init__(self, cells: Sequence[Cell], tell: Callable[[str, float], None]) -> None:
        self._all = sum(map(_work, cells)) or 1
        self._done = 0.0
        self._tell = tell

    def of_row(self, what: str, cell: Cell) -> Callable[[int, int], None]:
        """Function (just done, in all) for one row, which then counts."""
        before, amount = self._done, 0
        self._done += _work(cell)

        def advance(done: int, total: int) -> None:
            nonlocal amount
            amount += done
            self._tell(what, (before + _work(cell) * min(1, amount / total)) / self._all)

        self._tell(what, before / self._all)
        return advance


def _work(cell: Cell) -> float:
    return float(cell.get("length", 1))


def sweep(
    experiment: Experiment,
    sources: Sequence[ModelSource],
    *,
    dtype: Any,
    processes: Processes,
    json_path: str | None = None,
    note: Callable[[str], None] = lambda note: None,
    progress: Callable[[str, float], None] = lambda what, share: None,
) -> list[Row]:
    """Measure every cell of every model.

    Args:
        dtype: torch dtype to compute in.
        json_path: file of rows; None to keep nothing.
        note: told what a user should know.
        progress: told what is measured now, and the share of all work that is done.

    Raises:
        ValueError: the file is something else and would be lost.
    """
    file = ResultFile(json_path if processes.main else None)
    kept = file.by_settings().items()
    earlier = processes.from_main({digest: row for digest, row in kept if experiment.keeps(digest)})
    where = {"dtype": str(dtype), "device": processes.device.partition(":")[0]}
    cells = experiment.cells()
    question = ["model", *(cells[0] if cells else ()), "weights", "adapter", *experiment.question]
    wanted = [each for source in sources for each in _rows_of(source, experiment, cells, where)]
    rows: list[Row | None] = [earlier.get(settings) for _, _, settings in wanted]
    if found := sum(row is not None for row in rows):
        note(f"{found} of {len(rows)} rows were already in {json_path}")

    def save() -> list[Row]:
        measured = [row for row in rows if row is not None]
        file.save(measured, question)
        return measured

    missing = [cell for (_, cell, _), row in zip(wanted, rows, strict=True) if row is None]
    share = Share(missing, progress)
    model: LoadedModel | None = None
    for index, (source, cell, settings) in enumerate(wanted):
        if rows[index] is not None:
            continue
        if model is None or model.source is not source:
            model = None  # the last one's memory is free before the next one loads
            model = source.load(processes.device, dtype)
        try:
            rows[index] = row = _row(experiment, model, cell, settings, processes, share)
        except NotMeasurable as reason:
            note(str(reason))
            continue
        if processes.main:
            experiment.finished(row)
            save()
    return save()


def _rows_of(
    source: ModelSource, experiment: Experiment, cells: Sequence[Cell], where: dict[str, str]
) -> Iterator[tuple[ModelSource, Cell, str]]:
    """Each row of a model, with the digest of what decides it."""
    identity = {**source.identity(), **where, "model": source.label}
    for cell in cells:
        yield source, cell, settings_digest({**identity, **experiment.settings(source, cell)})


def _row(
    experiment: Experiment,
    model: LoadedModel,
    cell: Cell,
    settings: str,
    processes: Processes,
    share: Share,
) -> Row:
    source = model.source
    what = ", ".join(map(str, (source.label, *cell.values())))
    started = time.perf_counter()
    figures = experiment.measure(model, cell, share.of_row(what, cell))
    return {
        "model": source.label,
        **cell,
        **figures,
        **source.description(),
        "attention": "full",
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": processes.device,
        "processes": processes.count,
        "seconds": round(time.perf_counter() - started, 3),
        "settings": settings,
    }

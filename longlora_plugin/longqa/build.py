"""The builder: documents in, rows out, resumable at any point.

For each document in a fixed order, for each of its windows: the pairs of a *unit* are made (from
the text, or by a model), checked, recorded in the journal, and then written as rows in unit order,
whatever the order in which a model's replies came in. So the data file is always a prefix of what
an uninterrupted run writes, and a run that goes on adds the rest.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from longlora_plugin.longqa.asker import Asker
from longlora_plugin.longqa.documents import Unreadable, find_files
from longlora_plugin.longqa.endpoint import Endpoint
from longlora_plugin.longqa.journal import (
    CannotWrite,
    Journal,
    provenance_path,
    validation_path,
)
from longlora_plugin.longqa.optional import require
from longlora_plugin.longqa.quality import SAME_DOCUMENT, NearDuplicates
from longlora_plugin.longqa.reader import Reader
from longlora_plugin.longqa.sections import windows
from longlora_plugin.longqa.settings import (
    EXIT_DONE,
    EXIT_INCOMPLETE,
    EXIT_NOTHING,
    Report,
    Settings,
)
from longlora_plugin.longqa.stopping import Interrupt, Stop
from longlora_plugin.longqa.units import Composer, Unit
from longlora_plugin.longqa.writer import Writer

_RECORD_VERSION = 2


class Builder:
    """Builds one data file.

    Args:
        source: a file or a folder of documents.
        out: the data file, `.jsonl`; two more are next to it (see `journal`).
        settings: what decides the rows.
        tokenizer: a transformers tokenizer; measures everything.
        reader: reads the files.
        endpoint: the model to ask; None: tasks from the text.
        short: short instructions to mix in, as rows of any layout.

    Attributes:
        notify: called with the report after each step, for progress.
    """

    def __init__(
        self,
        source: Path,
        out: Path,
        settings: Settings,
        *,
        tokenizer: Any,
        reader: Reader,
        endpoint: Endpoint | None = None,
        short: Sequence[dict[str, Any]] = (),
    ) -> None:
        self.source, self.out, self.settings = source, out, settings
        self._folder = source if source.is_dir() else None
        self.tokenizer = tokenizer
        self.reader, self.endpoint = reader, endpoint
        self.short = short
        self.notify: Callable[[Report], None] = lambda report: None
        self.report = Report()
        # Found missing now, not after the first answer was paid for.
        require("sentencex", "finding sentences")
        if settings.evidence_edits:
            require("rapidfuzz", "--evidence-edits")
        self.composer = Composer(settings, tokenizer)

    def run(self) -> Report:
        """Build, or go on with, the data file.

        Raises:
            ValueError: the file was begun with other settings, or is not this command's.
        """
        from filelock import FileLock, Timeout

        report = self.report
        lock = FileLock(f"{provenance_path(self.out)}.lock")
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire(blocking=False)
        except Timeout:
            raise ValueError(f"another build is writing {self.out}; wait for it to end") from None
        except OSError as error:
            self._stop(CannotWrite(self.out.parent, error.strerror))
            return report
        try:
            with Journal(self.out, write=True) as journal, Interrupt() as interrupt:
                self._check_settings(journal)
                self._run(journal, interrupt)
        except Stop as stop:
            self._stop(stop)
        finally:
            lock.release()
            Path(lock.lock_file).unlink(missing_ok=True)
        if report.exit_code == EXIT_DONE:
            if not sum(report.pairs.values()):
                report.exit_code = EXIT_NOTHING
            elif report.failed:
                report.exit_code = EXIT_INCOMPLETE
        return report

    def _stop(self, stop: Stop) -> None:
        self.report.stopped, self.report.exit_code = str(stop), stop.exit_code
        self.notify(self.report)

    def dry_run(self) -> Report:
        """What `run` would ask for and cost at most; asks nothing and writes nothing."""
        journal = Journal(self.out)
        self._check_settings(journal, write=False)
        prompt = completion = 0
        for unit in self._units(journal):
            if unit.name not in journal.steps["unit"]:
                self.report.to_ask += 1
                if self.endpoint is not None:
                    most = self.composer.estimate(unit)
                    prompt, completion = prompt + most[0], completion + most[1]
        self.report.tokens = (prompt, completion)
        return self.report

    def _check_settings(self, journal: Journal, write: bool = True) -> None:
        vocabulary = json.dumps(sorted(self.tokenizer.get_vocab().items())).encode()
        now = {
            **asdict(self.settings),
            "tasks": list(self.settings.tasks),
            "tokenizer": hashlib.sha256(vocabulary).hexdigest()[:16],
            "short": hashlib.sha256(json.dumps(list(self.short)).encode()).hexdigest()[:16],
            "version": _RECORD_VERSION,
        }
        begun = journal.steps["settings"].get("")
        if begun is None:
            if self.out.exists() and self.out.stat().st_size:
                raise ValueError(
                    f"{self.out} exists and was not made by this command (no "
                    f"{journal.path.name} next to it); write to another file"
                )
            if write:
                journal.write("settings", "", now)
        elif begun != now:
            changed = [
                f"{name}: it has {begun.get(name)!r}, now {value!r}"
                for name, value in now.items()
                if begun.get(name) != value
            ]
            raise ValueError(
                f"{self.out} was begun with other settings ({'; '.join(changed)}); "
                "give the same ones to go on, or write to another file"
            )

    def _run(self, journal: Journal, interrupt: Interrupt) -> None:
        report, composer = self.report, self.composer
        writer = Writer(composer, journal, report, self.out, self.short)
        asker = None
        if self.endpoint is not None:
            asker = Asker(composer, journal, report, interrupt, self.endpoint)
        waiting: deque[Unit] = deque()
        try:
            for unit in self._units(journal):
                interrupt.check()
                waiting.append(unit)
                if unit.name not in journal.steps["unit"]:
                    if asker is None:
                        journal.write("unit", unit.name, composer.from_text(unit))
                    else:
                        asker.submit(unit)
                self._drain(waiting, journal, writer, asker)
            if asker is not None:
                asker.finish()
        except Stop as stop:
            self._stop(stop)
        finally:
            if asker is not None:
                asker.close()
            report.tokens = journal.spent
            self._drain(waiting, journal, writer, None)

    def _drain(
        self,
        waiting: deque[Unit],
        journal: Journal,
        writer: Writer,
        asker: Asker | None,
    ) -> None:
        """Write the units at the head that are finished; without an asker, all that are."""
        while waiting:
            unit = waiting[0]
            entry = journal.steps["unit"].get(unit.name)
            if entry is None and asker is not None and unit.name not in asker.failed:
                return
            waiting.popleft()
            if entry is not None:
                writer.write(unit, entry)
        self.notify(self.report)

    def _units(self, journal: Journal) -> Iterator[Unit]:
        """Every window of every document, in a fixed order; reports what gives none."""
        report = self.report
        files = [path for path in find_files(self.source) if not self._is_ours(path)]
        named = [(self._name_of(path), path) for path in files]
        # Documents of an earlier run first: a new one must not push an old one out as a duplicate.
        splits: dict[str, str] = {}
        for earlier in journal.steps["unit"].values():
            splits.setdefault(earlier["name"], earlier["split"])
        named.sort(key=lambda entry: (entry[0] not in splits, entry[0]))
        texts = NearDuplicates(SAME_DOCUMENT, sample=8)
        exact: dict[str, str] = {}
        for name, path in named:
            try:
                document = self.reader.read(path, name, self._folder)
            except Unreadable as error:
                report.skipped[name] = str(error)
                self.notify(report)
                continue
            same = exact.get(document.digest) or texts.repeats(name, document.text)
            if same:
                report.duplicates[name] = same
                continue
            exact[document.digest] = name
            report.documents += 1
            split = splits.get(name) or self.composer.split_of(document)
            cut, left_out = windows(
                document, self.composer.window_budget, self.composer.count, self.settings.language
            )
            report.windows += len(cut)
            report.left_out += left_out
            if not cut:
                report.barren[name] = "each of its sentences alone is longer than the context"
            for window in cut:
                described = f"{document.digest}|{window.index}|{window.text}"
                unit = hashlib.sha256(described.encode()).hexdigest()[:32]
                yield Unit(document, window, split, unit)

    def _is_ours(self, path: Path) -> bool:
        ours = (self.out, validation_path(self.out), provenance_path(self.out))
        if path.suffix == ".lock" or path.name.startswith(f"{ours[2].name}-"):
            return True
        return path.absolute() in [our.absolute() for our in ours]

    def _name_of(self, path: Path) -> str:
        name = path.relative_to(self._folder).as_posix() if self._folder else path.name
        # A name that is not UTF-8 can neither be shown nor recorded.
        return os.fsencode(name).decode("utf-8", "replace")

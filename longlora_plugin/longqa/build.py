"""The builder: documents in, rows out, resumable at any point.

For each document in a fixed order, for each of its windows: the pairs of a *unit* are made (from
the text, or by a model), checked, recorded in the journal, and then written as rows in unit order,
whatever the order in which a model's replies came in. So the data file is always a prefix of what
an uninterrupted run writes, and a run that goes on adds the rest.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import signal
import sys
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from longlora_plugin.longqa import tasks
from longlora_plugin.longqa.documents import Document, Reader, Unreadable, find_files, require
from longlora_plugin.longqa.endpoint import (
    ANSWER_TOKENS,
    Budget,
    Endpoint,
    EndpointError,
    EndpointStop,
    MalformedReply,
    ModelPair,
    Reply,
    estimate,
)
from longlora_plugin.longqa.journal import (
    CannotWrite,
    Journal,
    Rows,
    line_of,
    provenance_path,
    row_name,
    validation_path,
)
from longlora_plugin.longqa.quality import SAME_DOCUMENT, SIMILAR, NearDuplicates, has_evidence
from longlora_plugin.longqa.sections import Count, Window, windows
from longlora_plugin.longqa.wordings import (
    LAYOUTS,
    SPECIAL_TOKENS,
    as_row,
    as_trained,
    frame_texts,
    phrase,
    row_texts,
)

EXIT_DONE, EXIT_NOTHING, EXIT_INCOMPLETE = 0, 1, 3
EXIT_ENDPOINT, EXIT_BUDGET, EXIT_DISK, EXIT_INTERRUPTED = 4, 5, 6, 130
"""Exit codes of a build; 2 is click's for wrong options."""

SMALLEST_WINDOW = 64
"""Tokens that must be left for the document, or no question can be asked about it."""

FAILURES_IN_A_ROW = 5
"""Requests that fail one after the other before the endpoint counts as down."""

REPLIES = 3
"""How often a unit is asked for when the reply is not the JSON asked for."""

# A wrong estimate where texts meet must not push a row over the context.
_SLACK = 8
_RECORD_VERSION = 1


@dataclass(frozen=True)
class Settings:
    """What decides the rows; a build goes on only with the settings that it began with.

    Attributes:
        context: tokens of a row as it is trained, question and answer and prompt included.
        seed: of every choice.
        layout: one of wordings.LAYOUTS.
        questions: pairs asked for in each window.
        tasks: which tasks may be used (no model).
        kind: of every document; None: judged for each.
        language: ISO 639 code, for finding sentences.
        validation_share: share of documents whose rows go to the validation file.
        short_share: share of the training rows that are short instructions.
        model: name at the endpoint; None: tasks from the text.
        answer_tokens: longest answer of a model, in tokens.
        evidence_edits: characters by which a quote may differ from the document.
        similar: Jaccard similarity from which two pairs count as one.
    """

    context: int
    seed: int = 0
    layout: str = "alpaca"
    questions: int = 6
    tasks: tuple[str, ...] = tuple(tasks.TASKS)
    kind: str | None = None
    language: str = "en"
    validation_share: float = 0.0
    short_share: float = 0.0
    model: str | None = None
    answer_tokens: int = ANSWER_TOKENS
    evidence_edits: int = 0
    similar: float = SIMILAR

    def __post_init__(self) -> None:
        unknown = sorted(set(self.tasks) - set(tasks.TASKS))
        if unknown:
            raise ValueError(f"unknown task {unknown[0]!r}; valid: {', '.join(tasks.TASKS)}")
        if self.layout not in LAYOUTS:
            raise ValueError(f"unknown layout {self.layout!r}; valid: {', '.join(LAYOUTS)}")
        for name in ("validation_share", "short_share"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"--{name.replace('_', '-')} {getattr(self, name)} must be at least 0 and "
                    "below 1, for example 0.1"
                )


@dataclass
class Report:
    """What a build did; the counts are over all of its runs.

    Attributes:
        documents: documents read.
        skipped: file → why it gave no document.
        duplicates: file → the earlier file that it nearly repeats.
        windows: windows of all documents.
        left_out: sentences that alone exceed the context.
        pairs: rows by file: `train`, `validation`, `short` (part of the training file).
        tasks: rows by task.
        dropped: pairs kept out, by reason.
        failed: units that an endpoint gave nothing for, by reason.
        to_ask: units not built yet; of a dry run only.
        tokens: (prompt, completion) spent; in a dry run: at most to be spent.
        cost: of those tokens; None without prices.
        stopped: why the build ended early; None where it did not.
        exit_code: one of the EXIT_ constants.
    """

    documents: int = 0
    skipped: dict[str, str] = field(default_factory=dict)
    duplicates: dict[str, str] = field(default_factory=dict)
    windows: int = 0
    left_out: int = 0
    pairs: Counter[str] = field(default_factory=Counter)
    tasks: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    to_ask: int = 0
    tokens: tuple[int, int] = (0, 0)
    cost: float | None = None
    stopped: str | None = None
    exit_code: int = EXIT_DONE

    def as_json(self) -> dict[str, Any]:
        """Plain values, for `--json`."""
        # Not asdict, which cannot copy a Counter.
        return dict(vars(self))


@dataclass(frozen=True)
class Unit:
    """One window of one document: what one request asks about."""

    document: Document
    window: Window
    split: str
    name: str


class _Stop(Exception):
    def __init__(self, why: str, exit_code: int) -> None:
        super().__init__(why)
        self.exit_code = exit_code


class _Interrupt:
    """Ctrl-C as a wish that is looked at between steps: no step is ever left half done.

    Replies under way are waited for, since they are paid for; a second Ctrl-C ends the process
    there and then, which is as safe as a kill is.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: Any = None

    def __enter__(self) -> _Interrupt:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _note(self, *_: object) -> None:
        if self.asked:
            if sys.stderr.isatty():
                # A progress display hides the cursor.
                os.write(2, b"\x1b[?25h\n")
            os._exit(EXIT_INTERRUPTED)
        self.asked = True

    def check(self) -> None:
        if self.asked:
            raise _Stop("interrupted", EXIT_INTERRUPTED)


def token_count(tokenizer: Any) -> Count:
    """Counts tokens of texts with a transformers tokenizer, without special tokens."""
    # Its warning about long texts is about running a model, not about counting.
    tokenizer.model_max_length = int(1e30)

    def count(texts: Sequence[str]) -> list[int]:
        if not texts:
            return []
        found = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False)
        return [len(ids) for ids in found["input_ids"]]

    return count


class Builder:
    """Builds one data file.

    Args:
        source: a file or a folder of documents.
        out: the data file, `.jsonl`; two more stand beside it (see `journal`).
        settings: what decides the rows.
        tokenizer: a transformers tokenizer; measures everything.
        reader: reads the files.
        endpoint: the model to ask; None: tasks from the text.
        budget: of the endpoint; None: no limit.
        concurrency: requests at a time.
        short: short instructions to mix in, as rows of any layout.
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
        budget: Budget | None = None,
        concurrency: int = 4,
        short: Sequence[dict[str, Any]] = (),
        notify: Callable[[Report], None] = lambda report: None,
    ) -> None:
        self.source, self.out, self.settings = source, out, settings
        self.tokenizer, self.count = tokenizer, token_count(tokenizer)
        self.reader, self.endpoint, self.budget = reader, endpoint, budget
        self.reader.kind = settings.kind
        self.concurrency = concurrency
        self.short = short
        self.notify = notify
        self.report = Report()
        # Found missing now, not after the first answer was paid for.
        require("sentencex", "finding sentences")
        if settings.evidence_edits:
            require("rapidfuzz", "--evidence-edits")
        self.window_budget = self._window_budget()

    def _window_budget(self) -> int:
        """Tokens of a window so that the longest wording, question and answer still fit."""
        frames = [
            as_trained(self.settings.layout, text, "", self.tokenizer)
            for kind in ("paper", "book", "report", "code")
            for text in frame_texts(kind)
        ]
        context = self.settings.context
        frame = max(self.count(frames)) + SPECIAL_TOKENS + _SLACK
        if self.settings.model:
            pair = min(context // 2, self.settings.answer_tokens + 100)
        else:
            pair = min(context // 4, 1024)
        left = context - frame - pair
        if left < SMALLEST_WINDOW:
            raise ValueError(
                f"--context {context} leaves {max(0, left)} tokens for the document: the wording "
                f"takes {frame}, question and answer up to {pair}; "
                f"write at least --context {2 * (frame + SMALLEST_WINDOW)}"
            )
        return left

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
            report.stopped = f"{self.out.parent} cannot be written: {error.strerror}"
            report.exit_code = EXIT_DISK
            return report
        try:
            with (
                Journal(self.out, repair=True) as journal,
                _Interrupt() as interrupt,
            ):
                self._check_settings(journal)
                self._run(journal, interrupt)
        except CannotWrite as error:
            report.stopped, report.exit_code = str(error), EXIT_DISK
        finally:
            lock.release()
            Path(lock.lock_file).unlink(missing_ok=True)
        if report.exit_code == EXIT_DONE:
            if not sum(report.pairs.values()):
                report.exit_code = EXIT_NOTHING
            elif report.failed:
                report.exit_code = EXIT_INCOMPLETE
        return report

    def dry_run(self) -> Report:
        """What `run` would ask for and cost at most; asks nothing and writes nothing."""
        journal = Journal(self.out)
        self._check_settings(journal, write=False)
        prompt = completion = 0
        for unit in self._units(journal, write=False):
            if unit.name not in journal.units:
                self.report.to_ask += 1
                if self.endpoint is not None:
                    held = self._estimate(unit)
                    prompt, completion = prompt + held[0], completion + held[1]
        self.report.tokens = (prompt, completion)
        if self.budget is not None:
            self.report.cost = self.budget.prices.cost(prompt, completion)
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
        if journal.settings is None:
            if self.out.exists() and self.out.stat().st_size:
                raise ValueError(
                    f"{self.out} exists and was not made by this command (no "
                    f"{journal.path.name} beside it); write to another file"
                )
            if write:
                journal.write({"type": "settings", "settings": now})
        elif journal.settings != now:
            changed = [
                f"{name}: it has {journal.settings.get(name)!r}, now {value!r}"
                for name, value in now.items()
                if journal.settings.get(name) != value
            ]
            raise ValueError(
                f"{self.out} was begun with other settings ({'; '.join(changed)}); "
                "give the same ones to go on, or write to another file"
            )

    def _run(self, journal: Journal, interrupt: _Interrupt) -> None:
        writer = _Writer(self, journal)
        asker = _Asker(self, journal, interrupt) if self.endpoint is not None else None
        report = self.report
        waiting: deque[Unit] = deque()
        try:
            for unit in self._units(journal):
                interrupt.check()
                waiting.append(unit)
                if unit.name not in journal.units:
                    if asker is None:
                        journal.write(self._entry(unit, self._from_text(unit)))
                    else:
                        asker.submit(unit)
                self._drain(waiting, journal, writer, asker)
            if asker is not None:
                asker.finish()
        except _Stop as stop:
            report.stopped, report.exit_code = str(stop), stop.exit_code
            self.notify(report)
        finally:
            if asker is not None:
                asker.close()
            report.tokens = journal.spent
            if self.budget is not None:
                report.cost = self.budget.prices.cost(*journal.spent)
            self._drain(waiting, journal, writer, None)
            writer.close()

    def _drain(
        self,
        waiting: deque[Unit],
        journal: Journal,
        writer: _Writer,
        asker: _Asker | None,
    ) -> None:
        """Write the units at the head that are finished; without an asker, all that are."""
        while waiting:
            unit = waiting[0]
            entry = journal.units.get(unit.name)
            if entry is None and asker is not None and not asker.gave_up(unit):
                return
            waiting.popleft()
            if entry is not None:
                writer.write(unit, entry)
        self.notify(self.report)

    def _units(self, journal: Journal, write: bool = True) -> Iterator[Unit]:
        """Every window of every document, in a fixed order; reports what gives none."""
        report = self.report
        files = [path for path in find_files(self.source) if not self._is_ours(path)]
        named = [(self._name_of(path), path) for path in files]
        # Documents of an earlier run first: a new one must not push an old one out as a duplicate.
        named.sort(key=lambda entry: (entry[0] not in journal.splits, entry[0]))
        texts = NearDuplicates(SAME_DOCUMENT, sample=8)
        exact: dict[str, str] = {}
        for name, path in named:
            try:
                document = self.reader.read(path, name)
            except Unreadable as error:
                report.skipped[name] = str(error)
                self.notify(report)
                continue
            twin = exact.get(document.digest) or texts.find(document.text)
            if twin:
                report.duplicates[name] = twin
                continue
            exact[document.digest] = name
            texts.add(name, document.text)
            report.documents += 1
            split = journal.splits.get(name) or self._split(document)
            cut, left_out = windows(
                document, self.window_budget, self.count, self.settings.language
            )
            report.windows += len(cut)
            report.left_out += left_out
            if write and document.digest not in journal.documents:
                journal.write(
                    {
                        "type": "document",
                        "digest": document.digest,
                        "name": name,
                        "kind": document.kind,
                        "title": document.title,
                        "split": split,
                        "windows": len(cut),
                    }
                )
            for window in cut:
                described = f"{document.digest}|{window.index}|{window.text}"
                unit = hashlib.sha256(described.encode()).hexdigest()[:32]
                yield Unit(document, window, split, unit)

    def _is_ours(self, path: Path) -> bool:
        ours = (self.out, validation_path(self.out), provenance_path(self.out))
        return path.absolute() in [our.absolute() for our in ours] or path.suffix == ".lock"

    def _name_of(self, path: Path) -> str:
        return path.relative_to(self.source).as_posix() if self.source.is_dir() else path.name

    def _split(self, document: Document) -> str:
        share = self._number("split", document.digest) / 2**64
        return "validation" if share < self.settings.validation_share else "train"

    def _number(self, *parts: object) -> int:
        """A number of 64 bits that depends on the seed and on `parts` alone."""
        joined = "|".join(str(part) for part in (self.settings.seed, *parts))
        return int.from_bytes(hashlib.sha256(joined.encode()).digest()[:8], "big")

    def _from_text(self, unit: Unit) -> list[tasks.Pair]:
        document, settings = unit.document, self.settings
        material = tasks.Material(
            unit.window,
            document.style,
            document.kind,
            language=settings.language,
            code_language=document.language,
        )
        rng = random.Random(self._number("tasks", unit.name))
        return tasks.make_pairs(material, settings.questions, rng, settings.tasks)

    def from_model(self, unit: Unit, answer: Sequence[ModelPair]) -> list[tasks.Pair]:
        """Pairs of a model's answer as they are checked and written."""
        return [
            tasks.Pair("model", pair.question, pair.answer, tuple(pair.evidence))
            for pair in answer[: self.settings.questions]
        ]

    def _entry(
        self, unit: Unit, pairs: Sequence[tasks.Pair], spent: tuple[int, int] | None = None
    ) -> dict[str, Any]:
        """The journal's line of a finished unit: pairs that passed, and why others did not."""
        dropped: Counter[str] = Counter()
        kept = []
        for pair in pairs:
            if has_evidence(pair.evidence, unit.window.text, self.settings.evidence_edits):
                kept.append(pair)
            else:
                dropped["evidence not in the document"] += 1
        texts = [self.instruction(unit, pair.question) for pair in kept]
        layout = self.settings.layout
        trained = [
            as_trained(layout, text, pair.answer, self.tokenizer)
            for text, pair in zip(texts, kept, strict=True)
        ]
        recorded = []
        for pair, text, size in zip(kept, texts, self.count(trained), strict=True):
            if size + SPECIAL_TOKENS > self.settings.context:
                dropped["longer than the context"] += 1
                continue
            line = line_of(as_row(layout, text, pair.answer))
            recorded.append(
                {
                    "row": row_name(line),
                    "task": pair.task,
                    "tokens": size + SPECIAL_TOKENS,
                    "question": pair.question,
                    "answer": pair.answer,
                    "evidence": list(pair.evidence),
                }
            )
        entry: dict[str, Any] = {
            "type": "unit",
            "unit": unit.name,
            "document": unit.document.digest,
            "name": unit.document.name,
            "kind": unit.document.kind,
            "split": unit.split,
            "window": unit.window.index,
            "pairs": recorded,
            "dropped": dict(dropped),
        }
        if spent is not None:
            entry["spent"] = list(spent)
        return entry

    def instruction(self, unit: Unit, question: str) -> str:
        """The instruction of a row: one wording for a unit and question, always the same."""
        rng = random.Random(self._number("wording", unit.name, question))
        return phrase(unit.document.kind, unit.window.text, question, rng)

    def _estimate(self, unit: Unit) -> tuple[int, int]:
        return estimate(unit.window.tokens, self.settings.questions, self.settings.answer_tokens)


class _Writer:
    """Turns recorded units into rows, in order, each row once."""

    def __init__(self, builder: Builder, journal: Journal) -> None:
        self.builder, self.journal = builder, journal
        self.rows = {
            "train": Rows(builder.out, repair=True),
            "validation": Rows(validation_path(builder.out), repair=True),
        }
        self.pairs = NearDuplicates(builder.settings.similar)
        for entry in journal.units.values():
            for pair in entry["pairs"]:
                if pair["row"] in self.rows[entry["split"]].names:
                    self.pairs.add(pair["row"], _says(pair))
        self.short = self._short_lines()
        self.short_used = 0

    def write(self, unit: Unit, entry: dict[str, Any]) -> None:
        report, rows = self.builder.report, self.rows[unit.split]
        report.dropped.update(entry["dropped"])
        for pair in entry["pairs"]:
            if pair["row"] not in rows.names:
                if self.pairs.find(_says(pair)):
                    report.dropped["near-duplicate"] += 1
                    continue
                self.pairs.add(pair["row"], _says(pair))
                text = self.builder.instruction(unit, pair["question"])
                rows.append(line_of(as_row(self.builder.settings.layout, text, pair["answer"])))
            report.pairs[unit.split] += 1
            report.tasks[pair["task"]] += 1
            if unit.split == "train":
                self._mix_in()

    def _mix_in(self) -> None:
        """Add short rows until they have their share of the training rows."""
        share = self.builder.settings.short_share
        due = int(self.builder.report.pairs["train"] * share / (1 - share) + 1e-9)
        while self.short_used < min(due, len(self.short)):
            line, tokens = self.short[self.short_used]
            self.short_used += 1
            name = row_name(line)
            if name not in self.journal.short_tokens:
                self.journal.write({"type": "short", "row": name, "tokens": tokens})
            if name not in self.rows["train"].names:
                self.rows["train"].append(line)
            self.builder.report.pairs["short"] += 1

    def _short_lines(self) -> list[tuple[bytes, int]]:
        builder, settings = self.builder, self.builder.settings
        if not settings.short_share:
            return []
        texts = [row_texts(row) for row in builder.short]
        sizes = builder.count(
            [as_trained(settings.layout, *text, builder.tokenizer) for text in texts]
        )
        found: dict[bytes, int] = {}
        for text, size in zip(texts, sizes, strict=True):
            if size + SPECIAL_TOKENS > settings.context:
                builder.report.dropped["short instruction longer than the context"] += 1
            else:
                found[line_of(as_row(settings.layout, *text))] = size + SPECIAL_TOKENS
        ordered = sorted(found.items())
        random.Random(builder._number("short")).shuffle(ordered)
        return ordered

    def close(self) -> None:
        for rows in self.rows.values():
            rows.close()


def _says(pair: dict[str, Any]) -> str:
    """What two pairs are compared by: not the question's wording, which many pairs share."""
    if pair["task"] == "model":
        return f"{pair['question']}\n{pair['answer']}"
    return "\n".join([pair["task"], pair["answer"], *pair["evidence"]])


class _Asker:
    """Asks the endpoint about units, several at a time, within the budget."""

    def __init__(self, builder: Builder, journal: Journal, interrupt: _Interrupt) -> None:
        assert builder.endpoint is not None
        self.interrupt = interrupt
        self.builder, self.journal, self.endpoint = builder, journal, builder.endpoint
        self.pool = ThreadPoolExecutor(builder.concurrency)
        self.running: dict[Future[Reply], tuple[Unit, int]] = {}
        self.failed: set[str] = set()
        self.in_a_row = 0
        if builder.budget is not None:
            builder.budget.prompt, builder.budget.completion = journal.spent

    def gave_up(self, unit: Unit) -> bool:
        return unit.name in self.failed

    def submit(self, unit: Unit) -> None:
        """Ask about a unit once a request is free.

        Raises:
            _Stop: the budget is used up or the endpoint is of no use.
        """
        while len(self.running) >= self.builder.concurrency:
            self._collect()
        self._ask(unit, 1)

    def _ask(self, unit: Unit, attempt: int) -> None:
        budget, settings = self.builder.budget, self.builder.settings
        held = self.builder._estimate(unit)
        # What runs may turn out cheaper than what is held for it.
        while budget is not None and not budget.allow(unit.name, *held):
            if not self.running:
                raise _Stop(
                    f"the budget is used up: {sum(self.journal.spent):,} tokens spent, the next "
                    f"request may take {sum(held):,}; raise --max-tokens or --max-cost and give "
                    "the same command again",
                    EXIT_BUDGET,
                )
            self._collect()
        seed = self.builder._number("model", unit.name, attempt) % 2**31
        future = self.pool.submit(
            self.endpoint.ask, unit.window.text, unit.document.kind, settings.questions, seed
        )
        self.running[future] = (unit, attempt)

    def finish(self) -> None:
        """Wait for all that runs."""
        while self.running:
            self._collect()

    def _collect(self) -> None:
        """Take in the replies that are there, at least one."""
        done: set[Future[Reply]] = set()
        while not done:
            self.interrupt.check()
            done, _ = wait(self.running, timeout=0.2, return_when=FIRST_COMPLETED)
        for future in sorted(done, key=lambda future: self.running[future][0].name):
            self._take(future, again=True)

    def _take(self, future: Future[Reply], *, again: bool) -> None:
        unit, attempt = self.running.pop(future)
        try:
            reply = future.result()
        except EndpointStop as error:
            self._settle(unit, (0, 0))
            raise _Stop(str(error), EXIT_ENDPOINT) from None
        except EndpointError as error:
            spent = self._settle(unit, error.spent)
            if any(spent):
                self.journal.write({"type": "spent", "unit": unit.name, "spent": list(spent)})
            if again and attempt < REPLIES and isinstance(error, MalformedReply):
                self._ask(unit, attempt + 1)
            else:
                self._give_up(unit, str(error), again)
        else:
            self.in_a_row = 0
            spent = self._settle(unit, reply.spent)
            pairs = self.builder.from_model(unit, reply.pairs)
            self.journal.write(self.builder._entry(unit, pairs, spent))

    def _settle(self, unit: Unit, spent: tuple[int, int] | None) -> tuple[int, int]:
        if self.builder.budget is not None:
            return self.builder.budget.settle(unit.name, spent)
        return spent if spent is not None else self.builder._estimate(unit)

    def _give_up(self, unit: Unit, why: str, again: bool) -> None:
        self.failed.add(unit.name)
        self.builder.report.failed[why] += 1
        self.in_a_row += 1
        if again and self.in_a_row >= FAILURES_IN_A_ROW:
            raise _Stop(
                f"{self.in_a_row} requests in a row failed, the last one: {why}", EXIT_ENDPOINT
            )

    def close(self) -> None:
        """End; replies that are under way are paid for, so they are still taken in."""
        try:
            while self.running:
                done, _ = wait(self.running, return_when=FIRST_COMPLETED)
                for future in done:
                    with contextlib.suppress(_Stop):
                        self._take(future, again=False)
        finally:
            self.pool.shutdown(cancel_futures=True)


def read_short(path: Path) -> list[dict[str, Any]]:
    """Rows of a file of short instructions: JSONL, or one JSON list.

    Raises:
        ValueError: the file is missing, or a row is no instruction; names the line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"--short {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"--short {path} is not UTF-8; save it as UTF-8") from None
    try:
        if text.lstrip().startswith("["):
            numbered = list(enumerate(json.loads(text), 1))
        else:
            numbered = [
                (number, json.loads(line))
                for number, line in enumerate(text.split("\n"), 1)
                if line.strip()
            ]
    except json.JSONDecodeError as error:
        raise ValueError(f"--short {path} is not JSON or JSONL: {error}") from None
    rows = []
    for number, row in numbered:
        if not isinstance(row, dict):
            raise ValueError(f"--short {path}, row {number} is {row!r:.60}, not an object")
        try:
            row_texts(row)
        except ValueError as error:
            raise ValueError(f"--short {path}, row {number} {error}") from None
        rows.append(row)
    if not rows:
        raise ValueError(f"--short {path} holds no rows; give short instructions, one a line")
    return rows

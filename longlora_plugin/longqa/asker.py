"""Questions about units to a model at an endpoint, several at a time."""

from __future__ import annotations

import contextlib
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from longlora_plugin.longqa.endpoint import (
    Endpoint,
    EndpointError,
    MalformedReply,
    Reply,
)
from longlora_plugin.longqa.journal import Journal
from longlora_plugin.longqa.settings import EXIT_BUDGET, EXIT_ENDPOINT, Report
from longlora_plugin.longqa.stopping import Interrupt, Stop
from longlora_plugin.longqa.units import Composer, Unit

FAILURES_IN_A_ROW = 5
"""Requests that fail one after the other before the endpoint counts as down."""

REPLIES = 3
"""How often a unit is asked for when the reply is not the JSON asked for."""


class Asker:
    """Asks the endpoint about units, several at a time, within the budget."""

    def __init__(
        self,
        composer: Composer,
        journal: Journal,
        report: Report,
        interrupt: Interrupt,
        endpoint: Endpoint,
    ) -> None:
        self.composer, self.journal, self.report = composer, journal, report
        self.interrupt, self.endpoint = interrupt, endpoint
        self.concurrency = endpoint.requests.concurrency
        self.max_tokens = endpoint.requests.max_tokens
        self.pool = ThreadPoolExecutor(self.concurrency)
        self.running: dict[Future[Reply], tuple[Unit, int]] = {}
        self.failed: set[str] = set()
        self.in_a_row = 0

    def submit(self, unit: Unit) -> None:
        """Ask about a unit once a request is free.

        Raises:
            Stop: the budget is used up or the endpoint is of no use.
        """
        while len(self.running) >= self.concurrency:
            self._collect()
        self._ask(unit, 1)

    def _ask(self, unit: Unit, attempt: int) -> None:
        # What runs may turn out cheaper than what may be spent on it.
        while self.max_tokens is not None and self._at_most(unit) > self.max_tokens:
            if not self.running:
                raise Stop(
                    f"the budget is used up: {sum(self.journal.spent):,} tokens spent, and "
                    f"{self._at_most(unit):,} with the next request at its largest; raise "
                    "--max-tokens and give the same command again",
                    EXIT_BUDGET,
                )
            self._collect()
        seed = self.composer.number("model", unit.name, attempt) % 2**31
        future = self.pool.submit(
            self.endpoint.ask,
            unit.window.text,
            unit.document.kind,
            self.composer.settings.questions,
            seed,
        )
        self.running[future] = (unit, attempt)

    def _at_most(self, unit: Unit) -> int:
        """Tokens spent when all that runs, and then `unit`, take as many as they may."""
        units = [unit, *(running for running, _ in self.running.values())]
        return sum(self.journal.spent) + sum(sum(self.composer.estimate(one)) for one in units)

    def finish(self) -> None:
        """Wait for all that runs."""
        while self.running:
            self._collect()

    def close(self) -> None:
        """End; replies that are under way are paid for, so they are still taken in."""
        try:
            while self.running:
                with contextlib.suppress(Stop):
                    self._collect(closing=True)
        finally:
            self.pool.shutdown(cancel_futures=True)

    def _collect(self, *, closing: bool = False) -> None:
        """Take in the replies that are there, at least one."""
        done: set[Future[Reply]] = set()
        while not done:
            if not closing:
                self.interrupt.check()
            done, _ = wait(self.running, timeout=0.2, return_when=FIRST_COMPLETED)
        for future in sorted(done, key=lambda future: self.running[future][0].name):
            self._take(future, again=not closing)

    def _take(self, future: Future[Reply], *, again: bool) -> None:
        unit, attempt = self.running.pop(future)
        try:
            reply = future.result()
        except EndpointError as error:
            spent = self._spent(unit, error.spent)
            if any(spent):
                self.journal.write_spent(unit.name, spent)
            if again and attempt < REPLIES and isinstance(error, MalformedReply):
                self._ask(unit, attempt + 1)
            else:
                self._give_up(unit, str(error), again)
        else:
            self.in_a_row = 0
            spent = self._spent(unit, reply.spent)
            self.journal.write("unit", unit.name, self.composer.entry(unit, reply.pairs, spent))

    def _spent(self, unit: Unit, spent: tuple[int, int] | None) -> tuple[int, int]:
        return spent if spent is not None else self.composer.estimate(unit)

    def _give_up(self, unit: Unit, why: str, again: bool) -> None:
        self.failed.add(unit.name)
        self.report.failed[why] += 1
        self.in_a_row += 1
        if again and self.in_a_row >= FAILURES_IN_A_ROW:
            raise Stop(
                f"{self.in_a_row} requests in a row failed, the last one: {why}", EXIT_ENDPOINT
            )

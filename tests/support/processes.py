"""Processes of this machine that talk over gloo, started once for many tests."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

SECONDS = 90
"""Longer than any task takes: after it, processes count as hanging."""


class Processes:
    """`count` processes; each task runs in the first few of them, as one group.

    They are forked from one that has imported `modules`, which takes longer than many tasks.
    """

    def __init__(self, count: int, *modules: str) -> None:
        self.count = count
        self.modules = list(modules)
        self._workers: list[tuple[Any, Any]] = []
        self._folder = tempfile.TemporaryDirectory()

    def run(self, task: Callable[..., Any], *arguments: Any, size: int) -> list[Any]:
        """`task(group, *arguments)` in `size` processes: what each returned.

        An exception of a task is returned, as (name of its type, message), not raised.

        Raises:
            AssertionError: some process had not finished in time; all are killed.
        """
        if not self._workers:
            self._start()
        pipes = [pipe for _, pipe in self._workers[:size]]
        for pipe in pipes:
            pipe.send((task, size, arguments))
        found = []
        for rank, pipe in enumerate(pipes):
            if not pipe.poll(SECONDS):
                self.stop()
                raise AssertionError(f"{task.__name__}: process {rank} of {size} hangs")
            found.append(pipe.recv())
        return found

    def stop(self) -> None:
        for process, _ in self._workers:
            process.kill()
            process.join()
        self._workers = []

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(self.modules)
        meeting = Path(tempfile.mkdtemp(dir=self._folder.name)) / "meeting"
        for rank in range(self.count):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, self.count, str(meeting), theirs), daemon=True
            )
            with patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):
                process.start()
            self._workers.append((process, ours))


def _serve(rank: int, count: int, meeting: str, pipe: Any) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{meeting}",
        rank=rank,
        world_size=count,
        timeout=timedelta(seconds=SECONDS / 2),
    )
    groups = {size: dist.new_group(list(range(size))) for size in range(1, count + 1)}
    while True:
        task, size, arguments = pipe.recv()
        try:
            pipe.send(task(groups[size], *arguments))
        except Exception as error:
            traceback.print_exc()
            pipe.send((type(error).__name__, str(error)))

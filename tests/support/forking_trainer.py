"""Runs recipes without paying Axolotl's imports each time: imports once, then forks.

A program, not a test. Reads one JSON object a line from standard input,
{"recipe", "processes", "env", "log", "timeout"}, trains that recipe in freshly forked processes
with torchrun's environment variables, and answers with one line: the exit codes as a JSON list.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import socket
import sys
import time
import traceback

HEAVY = (
    "axolotl.cli.train",
    "axolotl.core.builders.causal",
    "axolotl.train",
    "bitsandbytes",
    "deepspeed",
    "peft",
    "transformers.trainer",
)


def train(recipe: str, rank: int, processes: int, env: dict[str, str], log: str, port: int) -> None:
    os.setsid()
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.environ.update(env)
    if processes > 1:
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(processes),
            LOCAL_WORLD_SIZE=str(processes),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
    code = 1
    try:
        from axolotl.cli.train import do_cli

        do_cli(recipe)
        code = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run(recipe: str, processes: int, env: dict[str, str], log: str, timeout: float) -> list[int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(processes):
        pid = os.fork()
        if pid == 0:
            train(recipe, rank, processes, env, log, port)
        children.append(pid)
    codes: dict[int, int] = {}
    end = time.monotonic() + timeout
    while len(codes) < processes:
        for pid in children:
            if pid in codes:
                continue
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > end or any(codes.values()):
            for pid in set(children) - set(codes):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    for pid in children:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)  # data loaders that outlived their process
    return [codes[pid] for pid in children]


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.argv = sys.argv[:1]
    for name in HEAVY:
        # Runs in one process need no DeepSpeed.
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(name)

    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(run(**json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()

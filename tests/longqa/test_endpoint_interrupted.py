"""A build that asks a model, killed or interrupted: no reply is lost or asked for twice."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time

import pytest
from longqa_material import Stub, rows

for package in ("openai", "sentencex", "datasketch"):
    pytest.importorskip(package)


def test_kill_9_at_any_point_and_again_gives_the_set_of_an_uninterrupted_run(ask, whole, tmp_path):
    out = tmp_path / "a.jsonl"
    kills = 3
    with Stub(delay=0.02) as stub:
        for _ in range(kills):
            before = len(stub.requests)
            # A fork has everything imported already; it is killed as any other process is.
            process = multiprocessing.get_context("fork").Process(
                target=ask, args=(stub.url, "--concurrency", 2)
            )
            process.start()
            deadline = time.monotonic() + 60
            while len(stub.requests) < before + 4:
                assert process.is_alive()
                assert time.monotonic() < deadline
                time.sleep(0.001)
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            assert process.exitcode == -signal.SIGKILL
            left = out.read_bytes() if out.exists() else b""
            assert whole[0].startswith(left)
        assert 0 < len(left) < len(whole[0])
        stub.delay = 0
        assert ask(stub.url).exit_code == 0
    assert out.read_bytes() == whole[0]
    # Only what was under way at a kill is asked again: two requests at a time.
    assert len(stub.requests) <= whole[1] + 2 * kills


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_keeps_the_replies_under_way_and_twice_drops_them(ask, whole, tmp_path, times):
    def in_child():
        sys.exit(ask(stub.url, "--concurrency", 2, "--retries", 0).exit_code)

    with Stub(delay=0.2 if times == 1 else 20) as stub:
        process = multiprocessing.get_context("fork").Process(target=in_child)
        process.start()
        deadline = time.monotonic() + 60
        while len(stub.requests) < (3 if times == 1 else 2):
            assert time.monotonic() < deadline
            time.sleep(0.001)
        for _ in range(times):
            os.kill(process.pid, signal.SIGINT)
            time.sleep(0.3 * (times - 1))
        process.join(15)
        assert process.exitcode == 130
        asked = len(stub.requests)
        assert asked < whole[1]
        out = tmp_path / "a.jsonl"
        assert (len(rows(out)) if out.exists() else 0) == (2 * asked if times == 1 else 0)
        stub.delay = 0
        assert ask(stub.url).exit_code == 0
    assert out.read_bytes() == whole[0]

"""The GPU benchmark: tiny on a CPU from end to end, its oracle, its page; on a GPU, exactness."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import dense_attention
import pytest
import torch

from benchmarks.gpu import cases, exact, page, profiling
from benchmarks.gpu.rows import NotHere, Rows

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("gpu")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--tiny", "--device", "cpu", "--out", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return out, done.stdout


def test_a_tiny_run_on_a_cpu_ends_well_with_a_row_for_every_case(tiny_run):
    out, _ = tiny_run
    rows = json.loads((out / "results.json").read_text())["rows"]
    lines = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    assert lines == rows
    for section in cases.SECTIONS:
        for case in cases.cases(section, cases.TINY):
            row = cases.find(rows, cases.key(section, case))
            assert "result" in row or "not available" in row["not_run"], row


def test_every_result_of_a_tiny_run_is_right_and_whole(tiny_run):
    rows = json.loads((tiny_run[0] / "results.json").read_text())["rows"]
    there = {
        name: [r["result"] for r in rows if r["section"] == name and "result" in r]
        for name in cases.SECTIONS
    }
    # sdpa and eager, three kinds of rows, three of heads, three dtypes.
    assert len(there["exact"]) == 54
    assert all(result["right"] and result["kernels"] for result in there["exact"])
    assert all(result["over_floor"]["s2 sdpa"] > 0 for result in there["attention"])
    assert all(r["seconds"] > 0 and r["planned_gib"] > 1 for r in there["step"])
    assert all(r["peak_gib"] is None for r in there["step"])  # a CPU has no such count
    assert all(0 < r["copies_share"] < 1 for r in there["profile"])


def test_the_oracle_equals_the_one_of_the_attention_tests():
    torch.manual_seed(0)
    for rows, (heads, kv_heads) in [("packed", (6, 2)), ("padded", (4, 1)), ("plain", (6, 3))]:
        ids = exact.document_ids(rows, 21)
        for row in ids:
            ours = torch.stack(
                [
                    exact.visible(row, 8, 4 * exact.is_shifted(h, heads, kv_heads))
                    for h in range(heads)
                ]
            )
            assert torch.equal(ours, dense_attention.masks(row, 8, heads, kv_heads))


def test_a_back_end_that_is_wrong_is_told_and_fails_the_run(tmp_path, monkeypatch):
    case = cases.Exact("sdpa", "float32", "plain", 4, 2)
    right = exact.backend_for("sdpa")
    monkeypatch.setattr(exact, "backend_for", lambda _: lambda *a: right(*a) * 1.001)
    rows = Rows(tmp_path, budget=60, machine="a")
    rows.measure(cases.key("exact", case), lambda: exact.compare(case, "cpu", 40))
    (wrong,) = rows.wrong()
    assert wrong["result"]["out"] == pytest.approx(1e-3, rel=0.1)


def test_rows_are_written_at_once_kept_and_measured_once(tmp_path):
    key = {"section": "step", "length": 8}
    rows = Rows(tmp_path, budget=60, machine="a")
    rows.measure(key, lambda: {"seconds": 1.0})
    with pytest.raises(KeyboardInterrupt):
        rows.measure({**key, "length": 16}, _interrupted)
    again = Rows(tmp_path, budget=60, machine="a")
    again.measure(key, _interrupted)
    assert again.find(key)["result"] == {"seconds": 1.0}
    assert Rows(tmp_path, budget=60, machine="another").rows == []


def test_errors_and_what_had_no_time_are_measured_by_the_next_run(tmp_path):
    key = {"section": "step", "length": 8}
    Rows(tmp_path, budget=-1, machine="a").measure(key, _interrupted)
    assert Rows(tmp_path, budget=0, machine="a").find(key)["not_run"] == "no time left"
    rows = Rows(tmp_path, budget=60, machine="a")
    rows.measure(key, lambda: 1 // 0)
    assert rows.wrong()[0]["error"].startswith("ZeroDivisionError")
    rows.measure(key, lambda: {"seconds": 2.0})
    assert rows.wrong() == []


def _interrupted():
    raise KeyboardInterrupt


def test_the_page_says_not_measured_for_what_has_no_row(tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"machine": None, "tiny": False, "rows": []}))
    empty = page.page(path)
    assert "No GPU machine came" in empty
    assert empty.count("not measured") == len(cases.BACKENDS) * 3 - 3 + 10 + 10 + 4
    step = cases.Step(8192, "s2")
    result = {"seconds": 1.25, "peak_gib": 20.0, "planned_gib": 21.0}
    row = {**cases.key("step", step), "result": result}
    path.write_text(json.dumps({"machine": "NVIDIA H100", "tiny": False, "rows": [row]}))
    assert "| 8192 | s2 | 1.25 | 20.0 | 21.0 |" in page.page(path)
    assert page.page(path).count("not measured") == empty.count("not measured") - 1
    path.write_text(json.dumps({"machine": "a CPU", "tiny": True, "rows": [row]}))
    with pytest.raises(ValueError, match="--tiny"):
        page.page(path)


def test_copies_are_told_from_arithmetic():
    times = {"void at::native::elementwise_kernel<direct_copy>": 30.0, "flash_fwd_kernel": 70.0}
    assert profiling.copies_share(times) == pytest.approx(0.3)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("backend", cases.BACKENDS)
def test_on_a_gpu_every_back_end_equals_dense_masks(backend, dtype):
    every = cases.cases(cases.section_of(backend), cases.GPU)
    todo = [case for case in every if (case.backend, case.dtype) == (backend, dtype)]
    if not todo:
        pytest.skip(f"{backend} takes 16 bits only")
    for case in todo:
        try:
            result = exact.compare(case, "cuda", 1000)
        except NotHere as reason:
            pytest.skip(str(reason))
        assert result["right"], (case, result)


@pytest.mark.gpu
def test_on_a_gpu_a_step_waits_nowhere_inside_a_layer():
    from benchmarks.gpu.training import profile_step

    result = profile_step(cases.Step(64, "s2"), cases.TINY, "cuda")
    assert not [line for line in result["waits"] if "longlora_plugin/attention" in line]

"""`python -m benchmarks.attention` on tiny shapes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from attention_material import assert_near, random_qkv
from click.testing import CliRunner
from flash_stand_in import install

from benchmarks.attention.__main__ import main
from benchmarks.attention.methods import roll_and_matmul
from longlora_plugin.attention import shifted_sparse_attention


def test_the_benchmark_times_every_back_end_and_writes_table_json_and_picture(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    flash = install("flash_attention_2", monkeypatch)
    outputs = {kind: tmp_path / f"out.{kind}" for kind in ("json", "png", "md")}
    result = CliRunner().invoke(
        main,
        [
            *["--lengths", "64,128", "--group-size", "32", "--rounds", "1", "--head-dim", "16"],
            *["--dtype", "bfloat16", "--device", "cpu"],
            *["--backend", "sdpa", "--backend", "flash_attention_2"],
            *["--json", str(outputs["json"]), "--plot", str(outputs["png"])],
            *["--markdown", str(outputs["md"])],
        ],
        catch_exceptions=False,
    )
    assert result.exit_code == 0
    assert flash.calls
    measured = json.loads(outputs["json"].read_text())
    assert "torch" in measured["machine"]
    cases = {
        (row["attention"], row["groups"], row["length"], row["method"]) for row in measured["rows"]
    }
    methods = ("full", "floor", "roll", "s2 sdpa", "s2 flash_attention_2")
    assert cases == {
        (heads, groups, length, method)
        for heads in ("MHA", "GQA")
        for groups in ("N·0.25", "32")
        for length in (64, 128)
        for method in methods
    }
    assert all(row["seconds"] > 0 and row["peak_bytes"] > 0 for row in measured["rows"])
    assert outputs["png"].stat().st_size > 1000
    assert outputs["md"].read_text().count("\n") == 2 + 2 * 2 * 2 * 2


def test_the_benchmarks_rolling_leaks_the_future_and_agrees_elsewhere() -> None:
    """The published algorithm and ours differ in the shifted heads' end half-groups only."""
    qkv = random_qkv(64, dtype=torch.float64)
    rolled = roll_and_matmul(*qkv, 16)
    ours = shifted_sparse_attention(*qkv, group_size=16)
    assert_near(rolled[:, :2], ours[:, :2], 1e-6)  # its softmax is in fp32
    assert_near(rolled[:, 2:, 8:], ours[:, 2:, 8:], 1e-6)
    assert (rolled[:, 2:, :8] - ours[:, 2:, :8]).abs().max() > 0.1

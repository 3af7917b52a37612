"""`make bench-parallel` counts real exchanges and compares with one process."""

from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner

from benchmarks.parallel.__main__ import main


def test_the_table_has_equal_outputs_and_the_bytes_of_the_formula(tmp_path: Path) -> None:
    result, table = tmp_path / "new/parallel.json", tmp_path / "parallel.md"
    options = ["--processes", "2", "--lengths", "128", "--group-size", "16", "--head-dim", "8"]
    done = CliRunner().invoke(main, [*options, "--json", str(result), "--markdown", str(table)])
    assert done.exit_code == 0, done.output
    (row,) = json.loads(result.read_text())["rows"]
    assert (row["exchanges"], row["backward_exchanges"]) == (1, 1)
    # Half a group of the one shifted KV head, keys and values.
    assert row["received"] == 8 * 2 * 8
    assert row["bytes"] == row["formula_bytes"] == 2 * row["received"]
    assert max(row["output_error"], row["gradient_error"]) < 1e-12
    assert table.read_text().count("\n") == 3

"""What commands print can be piped: no banner, nothing cut, JSON alone, one bar, a verdict."""

from __future__ import annotations

import io
import json
import os
import resource
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from rich.console import Console
from rich.table import Table

from longlora_plugin.cli import longlora
from longlora_plugin.cli.output import Output
from longlora_plugin.evaluation.sweep import Share
from longlora_plugin.evaluation.tables import verdicts
from longlora_plugin.recipes import available

ROOT = Path(__file__).parents[2]


def standard_output_of(*command: str, file: Path | None = None) -> str:
    environment = {**os.environ, "COLUMNS": "80", "PATH": f"{Path(sys.executable).parent}:/usr/bin"}
    output = file.open("a") if file else subprocess.PIPE
    done = subprocess.run(command, stdout=output, check=True, env=environment, text=True)
    return file.read_text() if file else done.stdout


@pytest.mark.e2e
def test_axolotls_banner_is_in_no_file(tmp_path):
    file = tmp_path / "shown.yml"
    file.write_text("# what was there\n")
    shown = standard_output_of(
        "axolotl", "longlora", "recipes", "show", "llama-2-7b-32k", file=file
    )
    recipe = available()["llama-2-7b-32k"].path.read_text()
    assert shown == f"# what was there\n{recipe}"
    assert yaml.safe_load(shown)["adapter"] == "longlora"


def test_a_command_of_its_own_is_the_group_and_starts_in_an_instant():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, name = scripts["longlora"].partition(":")
    assert getattr(import_module(module), name) is longlora
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    shown = standard_output_of(sys.executable, "-m", "longlora_plugin.cli", "--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "recipes" in shown
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.6


def test_every_json_option_writes_to_standard_output_alone(tmp_path):
    row = {"instruction": "a text. " * 20, "output": "an answer"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    for arguments in (["longqa", "stats", str(tmp_path / "rows.jsonl")], ["recipes", "list"]):
        done = CliRunner().invoke(longlora, [*arguments, "--json", "-"])
        assert json.loads(done.stdout)


def test_a_picture_of_an_unknown_kind_is_refused_at_once():
    with pytest.raises(ValueError, match=r"--plot: got x\.txt; write a name that ends in \.png"):
        Output(plot="x.txt")


def table() -> Table:
    made = Table("name", "what", "from")
    made.add_row("a-name-that-is-longer-than-most", "some words " * 30, "another_package")
    return made


def test_a_table_in_a_pipe_has_a_line_for_each_row(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    Output().table(table())
    row = next(line for line in capsys.readouterr().out.splitlines() if "a-name" in line)
    assert row.count("some words") == 30
    assert "another_package" in row


def test_a_table_on_a_narrow_terminal_loses_no_letter():
    out = Output()
    text = io.StringIO()
    out.console = Console(file=text, force_terminal=True, width=60, color_system=None)
    out.table(table())
    cells = [line.split("│")[1:4] for line in text.getvalue().splitlines() if "│" in line]
    assert "".join(name.strip() for name, *_ in cells) == "a-name-that-is-longer-than-most"
    assert "".join(what for _, what, _ in cells).count("some") == 30
    assert "".join(owner.strip() for *_, owner in cells) == "another_package"


def test_recipes_list_names_every_recipe_in_full():
    shown = CliRunner().invoke(longlora, ["recipes", "list"], env={"COLUMNS": "80"}).output
    assert all(f" {name} " in shown for name in available())


def test_recipes_list_is_short_on_a_terminal_of_80_columns(monkeypatch):
    monkeypatch.setattr(Console, "is_terminal", property(lambda self: True))
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "dumb")  # no colours
    shown = CliRunner().invoke(longlora, ["recipes", "list"]).output.splitlines()
    assert max(map(len, shown)) <= 80
    assert len(shown) < 3 * len(available()) + 6
    assert "base model" not in shown[1]


def test_one_bar_goes_once_from_nothing_to_the_end():
    seen: list[tuple[str, float]] = []
    cells = [{"length": 512}, {"length": 1536}]
    share = Share(cells, lambda what, done: seen.append((what, done)))
    for cell in cells:
        advance = share.of_row(f"base, {cell['length']}", cell)
        advance(1, 2)
        advance(1, 2)
    assert [done for _, done in seen] == [0, 0.125, 0.25, 0.25, 0.625, 1]
    assert seen[-1][0] == "base, 1536"


def test_the_bar_says_when_it_ends():
    out = Output()
    text = io.StringIO()
    out.errors = Console(file=text, force_terminal=True, width=100)
    with out.progress() as advance:
        advance("base, 512", 0.25)
        advance("base, 2048", 0.5)
    assert text.getvalue().count("base, 2048") >= 1
    assert "ends " in text.getvalue()


def row(model: str, *perplexities: float) -> dict:
    edges = [0, 256, 512, 1024]
    places = zip(edges, [*edges[1:], 2048], perplexities, strict=True)
    buckets = [{"from": a, "to": b, "perplexity": p} for a, b, p in places]
    return {"model": model, "length": 2048, "base_context": 256, "buckets": buckets}


def test_the_verdict_says_how_far_each_model_holds():
    rows = [row("base", 34.3, 78.8, 134.3, 144.1), row("adapter", 36.2, 35.1, 35.2, 35.3)]
    assert verdicts([*rows, {**rows[0], "length": 512}]) == [
        "base does not hold beyond 256: 4.20 × its perplexity at 256 by 2048",
        "adapter holds to 2048: 0.98 × its perplexity at 256",
    ]
    assert "does not hold beyond 512" in verdicts([row("x", 10, 10.5, 20, 30)])[0]


def test_there_is_no_verdict_within_the_base_models_context():
    inside = row("base", 34, 34, 34, 34) | {"base_context": 4096}
    assert verdicts([inside]) == []

"""`longlora serve-check`: how inference engines read what was saved."""

from __future__ import annotations

from dataclasses import asdict, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from longlora_plugin.cli.options import json_option

if TYPE_CHECKING:
    from longlora_plugin.artifacts.engines import EngineRow, Saved

COLOURS = {"equal": "green", "different": "red", "refused": "yellow", "not tried": "cyan"}


@click.command("serve-check")
@click.argument("run", type=click.Path(file_okay=False, path_type=Path))
@click.option("--engine", "names", multiple=True, help="Only this engine; can be repeated.")
@click.option("--run", "try_it", is_flag=True, help="Score a row of tokens in the engines.")
@click.option(
    "--python",
    "pythons",
    multiple=True,
    metavar="ENGINE=PATH",
    help="The Python that has an engine installed, for --run; can be repeated.",
)
@json_option("Write the rows.")
def command(
    run: Path, names: tuple[str, ...], try_it: bool, pythons: tuple[str, ...], json_path: str | None
) -> None:
    """How to serve an adapter's or a model's folder, engine by engine, and what would be wrong.

    RUN is what training or merging wrote. The verdicts were measured in the engines for each kind
    of RoPE; with --run this very folder is scored by each engine that --python names, on a row
    that is longer than the base model's context, and compared with transformers here.
    """
    from longlora_plugin.artifacts.engines import ENGINES, describe, judge
    from longlora_plugin.cli.output import Output

    out = Output(json_path)
    known = {engine.name: engine for engine in ENGINES}
    for name in names:
        if name not in known:
            near = get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ValueError(f"unknown engine {name!r}; {hint}engines: {', '.join(known)}")
    given = dict(_pair(text, known) for text in pythons)
    if given and not try_it:
        raise ValueError("--python is used with --run only; add --run")
    saved = describe(run.expanduser())
    rows = [judge(known[name], saved) for name in names or known]
    if try_it:
        rows = _tried(saved, rows, given)
    out.table(_table(rows))
    for row in rows:
        if row.command:
            out.print(f"{row.engine}:\n    {row.command}", markup=False)
    out.write_json([asdict(row) for row in rows], "rows")


def _pair(text: str, known: dict[str, Any]) -> tuple[str, str]:
    name, separator, path = text.partition("=")
    if not separator or name not in known or not Path(path).expanduser().is_file():
        raise ValueError(
            f"--python: got {text!r}; write ENGINE=PATH, a Python that has the engine installed, "
            f"for example vllm=/envs/vllm/bin/python; engines: {', '.join(known)}"
        )
    return name, str(Path(path).expanduser())


def _tried(saved: Saved, rows: list[EngineRow], pythons: dict[str, str]) -> list[EngineRow]:
    """The rows, with what each engine really computes for this folder."""
    import sys

    from longlora_plugin.artifacts.manifest import read_manifest
    from longlora_plugin.artifacts.trial import READERS, is_equal, perplexity_ratio, score_all

    if saved.is_adapter:
        raise ValueError(
            f"--run scores whole models, {saved.folder} is an adapter: axolotl merge-lora first, "
            f"then serve-check {saved.folder / 'merged'} --run"
        )
    pythons = {"transformers-5": sys.executable, **pythons}
    manifest = read_manifest(saved.folder)
    base = (manifest.base_context if manifest else None) or saved.context // 2
    length = min(saved.context, 2 * base)
    tokens = _row_of_text(saved.folder, length)
    reference, *_ = score_all("transformers-5", sys.executable, [saved.folder], tokens)
    if "error" in reference:
        raise ValueError(f"--run: transformers here does not score it: {reference['error']}")
    tried = []
    for row in rows:
        if row.engine not in pythons or row.engine not in READERS:
            tried.append(row)
            continue
        answer, *_ = score_all(row.engine, pythons[row.engine], [saved.folder], tokens)
        if "error" in answer:
            found = {"verdict": "refused", "reason": answer["error"], "command": None}
            tried.append(replace(row, basis="tried here", **found))
            continue
        scores = answer["scores"], reference["scores"]
        inside = perplexity_ratio(*scores, 1, base)
        beyond = perplexity_ratio(*scores, base, length - 1)
        same = is_equal(inside, beyond, engine=row.engine)
        tried.append(
            replace(
                row,
                verdict="equal" if same else "different",
                reason=row.reason if same else "its log-likelihoods are not those of transformers",
                basis=f"tried here with {answer['version']}",
                inside=round(inside, 4),
                beyond=round(beyond, 4),
            )
        )
    return tried


def _row_of_text(folder: Path, length: int) -> list[int]:
    """A row of English in the folder's own tokens; what it says is of no importance."""
    from transformers import AutoTokenizer

    text = Path(__file__).with_name("output.py").read_text(encoding="utf-8")
    ids = list(AutoTokenizer.from_pretrained(str(folder))(text)["input_ids"])
    return (ids * (length // len(ids) + 1))[:length]


def _table(rows: list[EngineRow]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(show_edge=False)
    for column in ("engine", "verdict", "what to know", "basis"):
        table.add_column(column, overflow="fold")
    for row in rows:
        verdict = Text(row.verdict, style=COLOURS[row.verdict])
        if row.beyond is not None:
            verdict.append(f" {row.inside:.3f} / {row.beyond:.3f}")
        table.add_row(row.engine, verdict, Text(row.reason), Text(row.basis))
    return table

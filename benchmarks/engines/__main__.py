"""Score small models with every kind of RoPE in each engine: `python -m benchmarks.engines`.

Every engine has a Python environment of its own, since their versions of transformers and torch
exclude each other (`make test-engines` builds them). The reference is transformers in this one.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.engines.models import CONTEXT, ROW, make_models, row_of_tokens
from longlora_plugin.artifacts.trial import READERS, is_equal, perplexity_ratio, score_all

MIDDLE = 1024


@dataclass(frozen=True)
class Row:
    """What one engine makes of one model.

    Attributes:
        engine, version: of the reader.
        model_type, rope: of the model.
        verdict: `equal`, `different`, or `refused`.
        inside, beyond: perplexity over transformers 5's, for tokens 256–1023 and 1024–1535; None
            where the engine gave no numbers.
        served_context: tokens that the engine takes as the limit by itself, where it tells.
        error: what the engine said when it refused.
    """

    engine: str
    version: str
    model_type: str
    rope: str
    verdict: str
    inside: float | None = None
    beyond: float | None = None
    served_context: int | None = None
    error: str | None = None


def measure(environments: Path, engines: list[str], only: list[str] | None) -> Iterator[Row]:
    """One row for each engine and model."""
    tokens = row_of_tokens()
    with tempfile.TemporaryDirectory() as scratch:
        models = list(make_models(Path(scratch), only or [""]))
        folders = [folder for *_, folder in models]
        references = score_all("transformers-5", sys.executable, folders, tokens)
        for engine in engines:
            python = environments / engine / "bin" / "python"
            answers = score_all(engine, python, folders, tokens)
            for model, answer, reference in zip(models, answers, references, strict=True):
                if "tokenizer.model" in answer.get("error", ""):
                    continue  # a converter wants the family's own tokenizer, which these have not
                yield _row(engine, *model[:2], answer, reference["scores"])


def _row(engine: str, model_type: str, rope: str, answer: dict, reference: list) -> Row:
    if "error" in answer:
        error = answer["error"].split(", got {")[0]  # a whole `rope_scaling` comes after that
        return Row(engine, answer["version"], model_type, rope, "refused", error=error)
    inside = perplexity_ratio(answer["scores"], reference, CONTEXT, MIDDLE)
    beyond = perplexity_ratio(answer["scores"], reference, MIDDLE, ROW - 1)
    return Row(
        engine,
        answer["version"],
        model_type,
        rope,
        "equal" if is_equal(inside, beyond, engine=engine) else "different",
        *(round(ratio, 4) if math.isfinite(ratio) else None for ratio in (inside, beyond)),
        answer.get("served_context"),
    )


def write(path: Path, rows: list[dict]) -> None:
    """Put rows into the matrix; earlier ones of the same engine and model are replaced."""
    earlier = json.loads(path.read_text())["rows"] if path.is_file() else []
    keys = ("engine", "model_type", "rope")
    table = {tuple(row[key] for key in keys): row for row in (*earlier, *rows)}
    path.write_text(json.dumps({"rows": [table[key] for key in sorted(table)]}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engines", description=__doc__)
    parser.add_argument("--environments", type=Path, default=Path(".venv-engines"))
    parser.add_argument("--engine", action="append", choices=sorted(READERS))
    parser.add_argument(
        "--only", action="append", help="part of a model's name, as in llama-yarn; repeatable"
    )
    parser.add_argument("--json", type=Path, help="matrix to write; rows of other engines stay")
    arguments = parser.parse_args()
    there = [
        engine
        for engine in arguments.engine or READERS
        if (arguments.environments / engine / "bin" / "python").is_file()
    ]
    print(f"engines: {', '.join(there) or 'none'}", flush=True)
    rows = []
    for row in measure(arguments.environments, there, arguments.only):
        rows.append(asdict(row))
        print(*(value for value in rows[-1].values() if value is not None), flush=True)
        if arguments.json:
            write(arguments.json, rows)


if __name__ == "__main__":
    main()

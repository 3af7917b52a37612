"""`python -m benchmarks.ruler`: measure, and write the rows that docs/reference/ruler.md shows."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import torch
from transformers import AutoTokenizer

from benchmarks.ruler.models import Retriever
from longlora_plugin.cli import longlora
from longlora_plugin.evaluation.bench import Bench
from longlora_plugin.evaluation.loading import LoadedModel
from longlora_plugin.evaluation.options import BenchOptions
from longlora_plugin.evaluation.processes import Processes
from longlora_plugin.evaluation.suites import NIAH_OFFLINE
from longlora_plugin.evaluation.sweep import sweep

RECIPE = "examples/configs/quickstart-cpu.yml"
LENGTHS = (256, 512, 1024, 2048)
REACHES = {"sees 256 tokens": 256, "sees 1024 tokens": 1024, "sees everything": None}
KEPT = (
    *("model", "task", "length", "score", "stderr", "examples", "longest_prompt"),
    *("beyond_length", "truncated", "seconds", "lm_eval"),
)


class Source(SimpleNamespace):
    """A model that is in memory."""

    def load(self, device: str, dtype: Any) -> LoadedModel:
        return LoadedModel(self, self.model, self.own_tokenizer, torch.device(device), dtype)

    def identity(self) -> dict[str, Any]:
        return {}

    def description(self) -> dict[str, Any]:
        return {}


def known_models(limit: int, lengths: tuple[int, ...] = LENGTHS) -> list[dict[str, Any]]:
    """Rows of models that find every needle within their reach, and nothing else."""
    tokenizer = AutoTokenizer.from_pretrained("examples/quickstart/model")
    sources = [
        Source(
            label=label, model=Retriever(tokenizer, reach), own_tokenizer=tokenizer, tokenizer=""
        )
        for label, reach in REACHES.items()
    ]
    alone = Processes(0, 1, "cpu")
    options = BenchOptions(tasks=NIAH_OFFLINE, lengths=lengths, limit=limit)
    experiment = Bench(dict.fromkeys(REACHES, tokenizer), options, alone)
    return sweep(experiment, sources, dtype=torch.float32, processes=alone)


@click.command(context_settings={"show_default": True})
@click.option("--out", type=click.Path(path_type=Path), default=Path("outputs/ruler"))
@click.option("--limit", default=2, help="Examples a task and length of the quickstart's models.")
@click.option("--known-limit", default=4, help="The same of the models made by hand.")
def main(out: Path, limit: int, known_limit: int) -> None:
    """RULER's tasks without data at 256 to 2048 tokens; goes on where it was stopped."""
    out.mkdir(parents=True, exist_ok=True)
    found = out / "quickstart.json"
    arguments = ["bench", RECIPE, "--tasks", "ruler-offline", "--limit", str(limit)]
    arguments += ["--lengths", ",".join(map(str, LENGTHS)), "--json", str(found)]
    longlora(arguments, standalone_mode=False)
    quickstart = json.loads(found.read_text(encoding="utf-8"))
    sections = {"quickstart": quickstart, "known": known_models(known_limit)}
    results = {
        name: [{key: row[key] for key in KEPT} for row in rows] for name, rows in sections.items()
    }
    (out / "ruler.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {out / 'ruler.json'}")


if __name__ == "__main__":
    main()

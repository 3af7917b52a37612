"""`python -m benchmarks.gpu --out FOLDER`: measure, and write `rows.jsonl` and `results.json`.

Sections in the order of their worth; whatever has no time left says so. `--tiny --device cpu` runs
every line of it on a machine without a GPU.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import click
import torch
import transformers

from benchmarks.attention.measure import machine
from benchmarks.gpu.attention import time_attention
from benchmarks.gpu.cases import GPU, SECTIONS, TINY, Attention, Case, Exact, cases, key
from benchmarks.gpu.exact import compare
from benchmarks.gpu.rows import Rows
from benchmarks.gpu.training import profile_step, time_step


@click.command(context_settings={"show_default": True})
@click.option("--out", type=click.Path(path_type=Path), default=Path("outputs/gpu"))
@click.option("--budget", default=600.0, help="Seconds for everything.")
@click.option("--sections", default=",".join(SECTIONS), help="Of these, with commas.")
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda")
@click.option("--tiny", is_flag=True, help="Small shapes: tries the benchmark, measures nothing.")
def main(out: Path, budget: float, sections: str, device: str, tiny: bool) -> None:
    """Is S²-Attn right on this GPU, and how fast?"""
    chosen = sections.split(",")
    if unknown := set(chosen) - set(SECTIONS):
        raise click.UsageError(f"--sections: got {unknown}; write some of {', '.join(SECTIONS)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise click.UsageError(
            "no CUDA device: torch.cuda.is_available() is False; "
            "to try the benchmark without one: --tiny --device cpu"
        )
    size = TINY if tiny else GPU
    where = f"{machine(device, 'bfloat16')}, transformers {transformers.__version__}"
    rows = Rows(out, budget, where + (", tiny" if tiny else ""))

    def measured(case: Case, section: str) -> partial:
        if isinstance(case, Exact):
            return partial(compare, case, device, size.exact_tokens)
        if isinstance(case, Attention):
            return partial(time_attention, case, size, device, 0.5 if tiny else 10.0)
        return partial(time_step if section == "step" else profile_step, case, size, device)

    for section in chosen:
        for case in cases(section, size):
            rows.measure(key(section, case), measured(case, section))
    results = {"machine": where, "tiny": tiny, "rows": rows.rows}
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    wrong = rows.wrong()
    for row in wrong:
        print(f"WRONG: {json.dumps(row)}")
    print(f"{out / 'results.json'}: {len(rows.rows)} rows, {len(wrong)} wrong")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()

"""How fast is S²-Attn, and how much memory does it take? Forward and backward, one process.

Four things are timed on the same leaves, laid out as attention modules produce them
([B, N, H, D] in memory, seen as [B, H, N, D]):

- `full`: PyTorch's SDPA, causal, on the whole row: what S² replaces;
- `floor`: SDPA on leaves grouped beforehand, two batches [B·N/G, H/2, G, D]: the same attention
  without any cost of grouping, the least that S² can take on this kernel;
- `roll`: the algorithm as LongLoRA published it (section 3.2, its listing), written plainly: repeat
  KV heads, roll half of the heads, softmax(q·kᵀ)·v with a causal mask in each group, roll back;
- `s2 …`: ours, one for each back end that this machine can run.

Methods take turns, round after round, so that a busy machine slows all of them alike; medians are
compared. On a CPU with one thread the clock is the process's own (CPU seconds), which stands still
while other processes run; elsewhere it is the wall's. Peak memory is what one forward and backward
adds to what lay there before, gradients of the leaves included.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.attention.measure import machine, peak_bytes, take_turns, usable_backends
from benchmarks.attention.methods import Setup, steps
from benchmarks.attention.report import HEADER, Row, plot, table

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Case:
    """One shape: tokens, tokens in a group and how that was chosen, heads."""

    length: int
    group_size: int
    groups: str
    heads: int
    kv_heads: int

    @property
    def attention(self) -> str:
        return "MHA" if self.heads == self.kv_heads else "GQA"


def cases(
    lengths: list[int], ratio: float, group_size: int, heads: int, kv_heads: int
) -> Iterator[Case]:
    """Every shape: MHA and GQA, groups as a share of the tokens and fixed, each length."""
    for kv in dict.fromkeys((heads, kv_heads)):
        for length in lengths:
            yield Case(length, int(length * ratio), f"N·{ratio:g}", heads, kv)
        for length in lengths:
            if length > group_size:
                yield Case(length, group_size, f"{group_size}", heads, kv)


@click.command(context_settings={"show_default": True})
@click.option("--lengths", default="2048,4096,8192,16384,32768", help="Tokens, with commas.")
@click.option("--ratio", default=0.25, help="Group size as a share of the tokens.")
@click.option("--group-size", default=2048, help="Fixed group size, in tokens.")
@click.option("--heads", default=4, help="Query heads.")
@click.option("--kv-heads", default=2, help="KV heads of the GQA case.")
@click.option("--head-dim", default=64)
@click.option("--rounds", default=9, help="Turns each method takes.")
@click.option("--budget", default=240.0, help="Seconds that turns of one length may take.")
@click.option("--threads", default=1, help="CPU threads; 1 is the steadiest.")
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu")
@click.option("--dtype", type=click.Choice(list(DTYPES)), default=None, help="[cpu: float32]")
@click.option("--backend", "backends", multiple=True, help="Back ends of S²  [all that run here]")
@click.option("--roll-up-to", default=8192, help="Longest row for roll-and-matmul, tokens.")
@click.option("--quick", is_flag=True, help="2k to 8k, 3 turns: about two minutes.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write results here.")
@click.option("--plot", "plot_path", type=click.Path(path_type=Path), help="Write a picture here.")
@click.option("--markdown", "md_path", type=click.Path(path_type=Path), help="Write a table here.")
def main(**options: Any) -> None:
    """Time S²-Attn against full attention, the floor, and the published algorithm."""
    asked = SimpleNamespace(**options)
    torch.set_num_threads(asked.threads)
    dtype = asked.dtype or ("bfloat16" if asked.device == "cuda" else "float32")
    lengths = [int(length) for length in asked.lengths.split(",")]
    if asked.quick:
        lengths = [length for length in lengths if length <= 8192]
        asked.rounds = min(asked.rounds, 3)
    setup = Setup(
        heads=asked.heads,
        head_dim=asked.head_dim,
        device=asked.device,
        dtype=DTYPES[dtype],
        backends=asked.backends or tuple(usable_backends(asked.device)),
        roll_up_to=asked.roll_up_to,
    )
    chosen = cases(lengths, asked.ratio, asked.group_size, asked.heads, asked.kv_heads)
    rows = measure(list(chosen), setup, asked.rounds, asked.budget)
    where = machine(asked.device, dtype)
    lines = table(rows)
    show(lines, where)
    if asked.json_path:
        result = {
            "machine": where,
            "head_dim": asked.head_dim,
            "rows": [asdict(row) for row in rows],
        }
        asked.json_path.write_text(json.dumps(result, indent=1) + "\n")
    if asked.plot_path:
        plot(rows, where, asked.plot_path)
    if asked.md_path:
        text = [HEADER, tuple("---" for _ in HEADER), *lines]
        asked.md_path.write_text("".join(f"| {' | '.join(line)} |\n" for line in text))


def measure(chosen: list[Case], setup: Setup, rounds: int, budget: float) -> list[Row]:
    """Every method on every case; those of one length and one number of KV heads in turn."""
    todo: dict[tuple[int, int], list[Case]] = {}
    for case in chosen:
        todo.setdefault((case.kv_heads, case.length), []).append(case)
    rows: list[Row] = []
    with Progress(transient=True) as progress:
        task = progress.add_task("S²-Attn", total=len(todo))
        for (kv_heads, length), alike in todo.items():
            shape = f"{setup.heads}/{kv_heads} heads, {length} tokens"
            progress.update(task, description=shape)
            group_sizes = dict.fromkeys(case.group_size for case in alike)
            methods = steps(length, group_sizes, kv_heads, setup)
            peaks = {key: peak_bytes(step, setup.device) for key, step in methods.items()}
            seconds = take_turns(methods, setup.device, rounds, budget)
            rows += [
                Row(
                    method=method,
                    attention=case.attention,
                    seconds=statistics.median(seconds[method, group_size]),
                    rounds=len(seconds[method, group_size]),
                    peak_bytes=peaks[method, group_size],
                    **asdict(case),
                )
                for case in alike
                for method, group_size in methods
                if group_size in (None, case.group_size)
            ]
            progress.advance(task)
            progress.console.print(f"{shape}: done")
    return sorted(rows, key=lambda row: (-row.kv_heads, row.groups.isdecimal(), row.length))


def show(lines: list[tuple[str, ...]], where: str) -> None:
    """The table on the terminal, whole on a narrow one."""
    shown = Table(*HEADER, title=f"S²-Attn, forward + backward: {where}")
    for line in lines:
        shown.add_row(*line)
    Console(width=max(Console().width, 120)).print(shown)


if __name__ == "__main__":
    main()

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

import click
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.attention.measure import machine, peak_bytes, take_turns, usable_backends
from benchmarks.attention.methods import steps
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
def main(
    lengths: str,
    ratio: float,
    group_size: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    rounds: int,
    budget: float,
    threads: int,
    device: str,
    dtype: str | None,
    backends: tuple[str, ...],
    roll_up_to: int,
    quick: bool,
    json_path: Path | None,
    plot_path: Path | None,
    md_path: Path | None,
) -> None:
    """Time S²-Attn against full attention, the floor, and the published algorithm."""
    torch.set_num_threads(threads)
    dtype = dtype or ("bfloat16" if device == "cuda" else "float32")
    tokens = [int(n) for n in lengths.split(",")]
    if quick:
        tokens, rounds = [n for n in tokens if n <= 8192], min(rounds, 3)
    chosen = list(backends) or usable_backends(device)
    todo: dict[tuple[int, int], list[Case]] = {}
    for case in cases(tokens, ratio, group_size, heads, kv_heads):
        todo.setdefault((case.kv_heads, case.length), []).append(case)
    rows: list[Row] = []
    console = Console()
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("S²-Attn", total=len(todo))
        for (kv, length), alike in todo.items():
            progress.update(task, description=f"{heads} heads, {kv} KV heads, {length} tokens")
            methods = steps(
                length,
                dict.fromkeys(case.group_size for case in alike),
                heads=heads,
                kv_heads=kv,
                head_dim=head_dim,
                device=device,
                dtype=DTYPES[dtype],
                backends=chosen,
                roll_up_to=roll_up_to,
            )
            peaks = {key: peak_bytes(step, device) for key, step in methods.items()}
            seconds = take_turns(methods, device, rounds, budget)
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
            progress.console.print(f"{heads}/{kv} heads, {length} tokens: done")
    rows.sort(key=lambda row: (-row.kv_heads, row.groups.isdecimal(), row.length))
    where = machine(device, dtype)
    shown = Table(*HEADER, title=f"S²-Attn, forward + backward: {where}")
    lines = table(rows)
    for line in lines:
        shown.add_row(*line)
    Console(width=max(console.width, 120)).print(shown)
    if json_path:
        result = {"machine": where, "head_dim": head_dim, "rows": [asdict(row) for row in rows]}
        json_path.write_text(json.dumps(result, indent=1) + "\n")
    if plot_path:
        plot(rows, where, plot_path)
    if md_path:
        text = [HEADER, tuple("---" for _ in HEADER), *lines]
        md_path.write_text("".join(f"| {' | '.join(line)} |\n" for line in text))


if __name__ == "__main__":
    main()

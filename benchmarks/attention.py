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

import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch.nn.functional import scaled_dot_product_attention

from longlora_plugin.attention import shifted_sparse_attention

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


@dataclass(frozen=True)
class Row:
    """Result of one method on one case; `peak_bytes` is forward + backward over what was there."""

    method: str
    length: int
    group_size: int
    groups: str
    attention: str
    heads: int
    kv_heads: int
    seconds: float
    rounds: int
    peak_bytes: int


def roll_and_matmul(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, group_size: int
) -> torch.Tensor:
    """LongLoRA's published algorithm, [B, H, N, D] → [B, H, N, D]; it leaks the future."""
    batch, heads, length, head_dim = query.shape
    repeats = heads // key.shape[1]
    key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    half = heads // 2

    def group(x: torch.Tensor) -> torch.Tensor:
        x = torch.cat([x[:, :half], x[:, half:].roll(-group_size // 2, dims=2)], dim=1)
        x = x.transpose(1, 2).reshape(batch * length // group_size, group_size, heads, head_dim)
        return x.transpose(1, 2)

    query, key, value = group(query), group(key), group(value)
    scores = query @ key.transpose(2, 3) * head_dim**-0.5
    later = torch.full((group_size, group_size), -torch.inf, device=query.device).triu(1)
    scores = scores + later.to(scores.dtype)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    out = (weights @ value).transpose(1, 2).reshape(batch, length, heads, head_dim)
    out = torch.cat(
        [out[:, :, :half], out[:, :, half:].roll(group_size // 2, dims=1)],
        dim=2,
    )
    return out.transpose(1, 2)


Step = Callable[[], None]
"""Forward and backward once."""
Method = tuple[str, int | None]
"""Name and group size; None for full attention, which has none."""


def steps(
    length: int,
    group_sizes: Iterable[int],
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    device: str,
    dtype: torch.dtype,
    backends: list[str],
    roll_up_to: int,
) -> dict[Method, Step]:
    """Everything that is timed on rows of one length."""
    qkv = [
        torch.randn(1, length, h, head_dim).to(device, dtype).transpose(1, 2).requires_grad_()
        for h in (heads, kv_heads, kv_heads)
    ]

    def run(attend: Callable[..., torch.Tensor], inputs: list[torch.Tensor]) -> None:
        out = attend(*inputs)
        out.backward(torch.ones_like(out))
        for leaf in inputs:
            leaf.grad = None

    def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
        )

    def floor(group_size: int) -> Step:
        plain = kv_heads - kv_heads // 2
        halves = [
            [
                torch.randn(length // group_size, h, group_size, head_dim)
                .to(device, dtype)
                .requires_grad_()
                for h in (kv * heads // kv_heads, kv, kv)
            ]
            for kv in (plain, kv_heads - plain)
        ]

        def step() -> None:
            outs = [sdpa(*half) for half in halves]
            torch.autograd.backward(outs, [torch.ones_like(out) for out in outs])
            for half in halves:
                for leaf in half:
                    leaf.grad = None

        return step

    methods: dict[Method, Step] = {("full", None): lambda: run(sdpa, qkv)}
    for group_size in group_sizes:
        methods["floor", group_size] = floor(group_size)
        if length <= roll_up_to:
            roll = partial(roll_and_matmul, group_size=group_size)
            methods["roll", group_size] = partial(run, roll, qkv)
        for backend in backends:
            ours = partial(shifted_sparse_attention, group_size=group_size, backend=backend)
            methods[f"s2 {backend}", group_size] = partial(run, ours, qkv)
    return methods


def timed(step: Step, device: str) -> float:
    """Seconds of one step."""
    if device == "cpu":
        clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        start = clock()
        step()
        return clock() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def take_turns(
    methods: dict[Method, Step], device: str, rounds: int, budget: float
) -> dict[Method, list[float]]:
    """Seconds of each turn of each method: `rounds` turns, fewer (3 at least) beyond `budget`."""
    seconds: dict[Method, list[float]] = {method: [] for method in methods}
    start = time.perf_counter()
    for turn in range(rounds):
        if turn >= min(3, rounds) and time.perf_counter() - start > budget:
            break
        for method, step in methods.items():
            seconds[method].append(timed(step, device))
    return seconds


@contextmanager
def quiet_stderr() -> Iterator[None]:
    """Keep the profiler's start and stop lines, written by C++, off the terminal."""
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def peak_bytes(step: Step, device: str) -> int:
    """Most bytes that one step holds over what was allocated before it."""
    gc.collect()
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with (
        quiet_stderr(),
        torch.profiler.profile(activities=activities, profile_memory=True) as profile,
    ):
        step()
    kineto: Any = profile.profiler
    changes = sorted(
        (event.start_ns(), event.nbytes())
        for event in kineto.kineto_results.events()
        if event.name() == "[memory]"
    )
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


def usable_backends(device: str) -> list[str]:
    """Back ends of S² that this machine can run."""
    if device != "cuda":
        return ["sdpa"]
    from transformers.utils import (
        is_flash_attn_2_available,
        is_flash_attn_3_available,
        is_flash_attn_4_available,
    )

    flash = {
        "flash_attention_2": is_flash_attn_2_available,
        "flash_attention_3": is_flash_attn_3_available,
        "flash_attention_4": is_flash_attn_4_available,
    }
    return ["sdpa", "flex_attention", *[name for name, is_there in flash.items() if is_there()]]


def machine(device: str, dtype: str) -> str:
    """What the figures were measured on."""
    if device == "cuda":
        hardware = torch.cuda.get_device_name()
    else:
        cpuinfo = Path("/proc/cpuinfo")
        names = [
            line.split(":", 1)[1].strip()
            for line in (cpuinfo.read_text().splitlines() if cpuinfo.exists() else [])
            if line.startswith("model name")
        ]
        hardware = (
            f"{names[0] if names else platform.processor()} "
            f"({torch.get_num_threads()} of {len(names) or '?'} cores)"
        )
    return f"{hardware}, {dtype}, torch {torch.__version__}"


def ratios(rows: list[Row]) -> Iterator[tuple[Row, dict[str, float]]]:
    """Each S² row with its time over that of the other methods on the same case."""
    for row in rows:
        if not row.method.startswith("s2"):
            continue
        alike = {
            other.method: row.seconds / other.seconds
            for other in rows
            if not other.method.startswith("s2")
            and (other.length, other.groups, other.attention)
            == (row.length, row.groups, row.attention)
        }
        before = [
            other
            for other in rows
            if other.method == row.method
            and (other.length * 2, other.groups, other.attention)
            == (row.length, row.groups, row.attention)
        ]
        if before:
            alike["half"] = row.seconds / before[0].seconds
        yield row, alike


HEADER = (
    "heads",
    "groups",
    "tokens",
    "method",
    "ms",
    "÷ full",
    "÷ floor",
    "÷ roll",
    "÷ half the tokens",
    "peak MiB",
    "full MiB",
)


def table(rows: list[Row]) -> list[tuple[str, ...]]:
    """One line for each S² row, as text."""
    lines = []
    for row, over in ratios(rows):
        full = next(
            other
            for other in rows
            if other.method == "full"
            and (other.length, other.groups, other.attention)
            == (row.length, row.groups, row.attention)
        )
        lines.append(
            (
                f"{row.attention} {row.heads}/{row.kv_heads}",
                row.groups,
                f"{row.length}",
                row.method,
                f"{row.seconds * 1000:.0f}" if row.seconds > 0.1 else f"{row.seconds * 1000:.2f}",
                *[
                    f"{over[name]:.2f}" if name in over else "–"
                    for name in ("full", "floor", "roll", "half")
                ],
                f"{row.peak_bytes / 2**20:.0f}",
                f"{full.peak_bytes / 2**20:.0f}",
            )
        )
    return lines


def plot(rows: list[Row], title: str, path: Path) -> None:
    """Time over tokens, both axes logarithmic, a panel for each kind of heads and groups."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = sorted({(row.attention, row.groups) for row in rows}, reverse=True)
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(5 * len(panels), 4.2), sharey=True, squeeze=False
    )
    for axis, (attention, groups) in zip(axes[0], panels, strict=True):
        here = [row for row in rows if (row.attention, row.groups) == (attention, groups)]
        for method in dict.fromkeys(row.method for row in here):
            points = sorted((r.length, r.seconds) for r in here if r.method == method)
            axis.plot(*zip(*points, strict=True), marker="o", label=method)
        axis.set(xscale="log", yscale="log", xlabel="tokens", title=f"{attention}, G = {groups}")
        ticks = sorted({row.length for row in here})
        axis.set_xticks(
            ticks, [f"{tick // 1024}k" if tick >= 1024 else f"{tick}" for tick in ticks]
        )
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("seconds, forward + backward")
    axes[0][0].legend()
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


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

"""What does S²-Attn over several processes send, and does it compute what one process does?

Each case starts P processes on this machine. They share a row of N tokens at a fixed group size G,
run one layer's attention forward and backward in float64, and count what their collectives move.
The same table says how far outputs and gradients are from one process on the whole row. Ring
attention and Ulysses are formulas of what they send for the same heads; nothing here is timed, and
nothing says how fast a network is.

Bytes are those of the busiest process in bf16, forward; backward sends the gradients of the same
tensors. A process both sends and receives; what is counted is what it receives.
"""

from __future__ import annotations

import json
import multiprocessing
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from benchmarks.parallel.measure import SECONDS, Case, Counted, process
from longlora_plugin.plan.parallel import bytes_sent
from longlora_plugin.plan.shape import ModelShape

BYTES = 2
"""Of a number in bf16."""

HEADER = (
    "processes", "tokens", "group", "exchanges a layer", "numbers received", "KB, bf16",
    "formula, KB", "ring, KB", "Ulysses, KB", "output", "gradients",
)  # fmt: skip


@dataclass(frozen=True)
class Row(Case):
    """A case and what was found: see `Counted`, bytes of the busiest process."""

    exchanges: int
    backward_exchanges: int
    received: int
    bytes: int
    formula_bytes: int
    ring_bytes: int
    ulysses_bytes: int
    output_error: float
    gradient_error: float


def run(case: Case) -> list[Counted]:
    """What each process of a case counted.

    Raises:
        RuntimeError: some process failed or did not finish.
    """
    context = multiprocessing.get_context("spawn")
    started = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for rank in range(case.processes):
                ours, theirs = context.Pipe(duplex=False)
                arguments = (rank, f"{folder}/meeting", case, theirs)
                started.append((context.Process(target=process, args=arguments), ours))
                started[-1][0].start()
                theirs.close()
            found = []
            for rank, (_, pipe) in enumerate(started):
                if not pipe.poll(SECONDS):
                    raise RuntimeError(f"{case}: process {rank} hangs")
                found.append(pipe.recv())
            return found
        except EOFError as error:
            raise RuntimeError(f"{case}: a process failed; its error is above") from error
        finally:
            for each, _ in started:
                each.kill()
                each.join()


def row_of(case: Case, counted: list[Counted]) -> Row:
    """The busiest process's numbers beside the formulas that `plan` prints."""
    shape = ModelShape(
        hidden=case.heads * case.head_dim, vocab=1, layers=1, heads=case.heads,
        kv_heads=case.kv_heads, head_dim=case.head_dim, value_dim=case.head_dim,
        rotary_dim=case.head_dim, windows=(None,), projection_weights=0, ffn_weights=0,
        head_weights=0, norm_elements=0,
    )  # fmt: skip
    planned = bytes_sent(shape, case.tokens, case.processes, case.group_size)
    received = max(each.received for each in counted)
    return Row(
        **asdict(case),
        exchanges=max(each.exchanges for each in counted),
        backward_exchanges=max(each.backward_exchanges for each in counted),
        received=received,
        bytes=received * BYTES,
        formula_bytes=planned["halo"],
        ring_bytes=planned["ring"],
        ulysses_bytes=planned["ulysses"],
        output_error=max(each.output_error for each in counted),
        gradient_error=max(each.gradient_error for each in counted),
    )


def line_of(row: Row) -> tuple[str, ...]:
    sizes = (row.bytes, row.formula_bytes, row.ring_bytes, row.ulysses_bytes)
    return (
        str(row.processes),
        f"{row.tokens:,}",
        f"{row.group_size:,}",
        f"{row.exchanges} + {row.backward_exchanges}",
        f"{row.received:,}",
        *(f"{size / 1000:,.1f}" for size in sizes),
        f"{row.output_error:.0e}",
        f"{row.gradient_error:.0e}",
    )


@click.command(context_settings={"show_default": True})
@click.option("--processes", default="2,4", help="Processes, with commas.")
@click.option("--lengths", default="1024,2048,4096", help="Tokens of the whole row, with commas.")
@click.option("--group-size", default=256, help="Tokens in a group.")
@click.option("--heads", default=4, help="Query heads.")
@click.option("--kv-heads", default=2)
@click.option("--head-dim", default=64)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write results here.")
@click.option("--markdown", "md_path", type=click.Path(path_type=Path), help="Write a table here.")
def main(  # noqa: PLR0913  (one parameter an option)
    processes: str,
    lengths: str,
    group_size: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    json_path: Path | None,
    md_path: Path | None,
) -> None:
    """Count what S²-Attn sends between processes, and compare it with one process."""
    rows = []
    for count in map(int, processes.split(",")):
        for tokens in map(int, lengths.split(",")):
            case = Case(count, tokens, group_size, heads, kv_heads, head_dim)
            rows.append(row_of(case, run(case)))
    lines = [line_of(row) for row in rows]
    shown = Table(*HEADER, title="S²-Attn over several processes, one layer, the busiest process")
    for line in lines:
        shown.add_row(*line)
    Console(width=max(Console().width, 140)).print(shown)
    if json_path:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps({"rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    if md_path:
        text = [HEADER, tuple("---" for _ in HEADER), *lines]
        md_path.write_text("".join(f"| {' | '.join(line)} |\n" for line in text))


if __name__ == "__main__":
    main()

"""`axolotl longlora plan`: will it fit, what will it cost."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from longlora_plugin.cli.options import json_option
from longlora_plugin.cli.output import Output

if TYPE_CHECKING:
    from longlora_plugin.plan import Plan


@click.command("plan")
@click.argument("recipe", required=False, type=click.Path(dir_okay=False, path_type=Path))
@click.option("--gpu", metavar="NAME", help="a100-80gb, rtx4090-24gb, …, or a size: 48gb.")
@click.option("--gpus", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--paper", is_flag=True, help="Compare with the paper's Tables 11 and 12 instead.")
@json_option("Write the figures as JSON.")
@click.option("--plot", metavar="PNG", help="Memory and FLOPs against length.")
def command(
    recipe: Path | None,
    gpu: str | None,
    gpus: int,
    paper: bool,
    json_path: str | None,
    plot: str | None,
) -> None:
    """Parameters, FLOPs, memory and the longest context of RECIPE.

    Needs the base model's config.json only: no weights, no GPU, no dataset. Memory is for each
    GPU; the answer to "does it fit" never changes the exit status.
    """
    out = Output(json_path, plot)
    if paper:
        if recipe or plot:
            raise click.UsageError("--paper stands alone: no RECIPE and no --plot with it")
        figures = _print_paper(out)
    else:
        if recipe is None:
            raise click.UsageError("name a RECIPE, or ask for --paper")
        figures = _print_plan(out, recipe, gpu, gpus)
    out.write_json(figures)
    out.wrote("plot", out.plot)


def _print_plan(out: Output, path: Path, gpu: str | None, gpus: int) -> dict[str, Any]:
    from longlora_plugin.plan import find_gpu, plan_run, planned_run
    from longlora_plugin.run.recipe import read_recipe

    card = find_gpu(gpu) if gpu else None
    recipe = read_recipe(path)
    run = planned_run(recipe, recipe.base_config(), gpus)
    plan = plan_run(recipe, run, card)
    _print_tables(out, plan)
    if out.plot:
        from longlora_plugin.plan.plot import plot_plan

        plot_plan(run, plan.sequence_len, card, out.plot)
    return asdict(plan)


def _table(title: str, *columns: str) -> Any:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    return table


def _print_tables(out: Output, plan: Plan) -> None:
    counts = plan.parameters
    share = counts["trained"] / (counts["trained"] + counts["frozen"])
    out.print(
        f"{plan.base_model}, adapter: {plan.adapter or 'none (full fine-tune)'}, "
        f"sequence_len: {plan.sequence_len}",
    )
    out.print(
        f"parameters: {counts['trained']:,} trained ({share:.2%}), {counts['frozen']:,} frozen",
    )
    group = f"S², G = {plan.group_size}" if plan.group_size else "S² (rows too short for it)"
    table = _table(
        "TFLOPs of one row", "part", "forward, full", group, "step, full", f"step, {group}"
    )
    for part in ("attention", "projections", "ffn", "others", "total"):
        table.add_row(
            part,
            *(
                f"{counted[kind][part]:,.1f}"
                if counted[kind]["total"] >= 1
                else f"{counted[kind][part]:.3g}"
                for counted in (plan.flops, plan.step)
                for kind in ("full", "s2")
            ),
        )
    table.caption = "forward: dense, as the paper counts; step: causal pairs, what kernels compute"
    out.table(table)
    how = "" if plan.shifted_attention else " (this recipe does not use S²)"
    out.print(f"a step with S² is up to {plan.speedup:.2f} × as fast as with full attention{how}")
    if plan.shifted_attention and plan.speedup_run != plan.speedup:
        out.print(f"the whole run, its last steps with full attention: {plan.speedup_run:.2f} ×")

    table = _table(f"GiB on each of {plan.gpus} GPU{'s' * (plan.gpus > 1)}", "part", "GiB")
    for part, value in plan.memory.items():
        if part in ("total", "needed"):
            continue
        table.add_row(part, f"{value:.2f}")
    table.add_section()
    table.add_row("total", f"{plan.memory['total']:.2f}")
    table.add_row("needed, without fragments", f"{plan.memory['needed']:.2f}")
    out.table(table)
    if plan.gpu:
        out.print(_verdict(plan))
    else:
        table = _table(f"On {plan.gpus} × …", "GPU", "fits", "longest with room", "longest")
        for row in plan.by_gpu:
            word = "no" if not row.fits else "tight" if row.tight else "yes"
            longest = (row.comfortable_sequence_len, row.largest_sequence_len)
            table.add_row(row.gpu, word, *(f"{length:,}" for length in longest))
        out.table(table)
    for note in plan.notes:
        out.print(f"note: {note}")


def _verdict(plan: Plan) -> str:
    where = f"{plan.gpus} × {plan.gpu} ({plan.gpu_memory:g} GiB)"
    need, total = (f"{plan.memory[key]:.1f} GiB" for key in ("needed", "total"))
    if not plan.fits:
        word = f"does not fit {where}: {need} of tensors"
    elif plan.tight:
        word = (
            f"may just fit {where}: {need} of tensors, but {total} as allocators usually "
            "fragment; leave Axolotl's PYTORCH_ALLOC_CONF (expandable segments) as it is"
        )
    else:
        word = f"fits {where}"
    return (
        f"{word}; longest sequence_len: {plan.comfortable_sequence_len:,} with room for "
        f"fragments, {plan.largest_sequence_len:,} at most"
    )


def _print_paper(out: Output) -> dict[str, Any]:
    from longlora_plugin.plan import paper

    ours = paper.table_11()
    table = _table(
        "Table 11: TFLOPs of a forward pass, Llama2-7B", "length", "", *paper.PARTS, "paper"
    )
    for length, kinds in paper.TABLE_11.items():
        for kind, printed in kinds.items():
            planned = tuple(ours[length][kind].values())
            said = "the same" if planned == printed else " ".join(map(str, printed))
            table.add_row(
                str(length),
                "full" if kind == "full" else "S²",
                *(f"{value:.1f}" for value in planned),
                said,
            )
    table.caption = "totals are sums of the printed parts, as in the paper"
    out.table(table)

    cells = paper.table_12()
    table = _table(
        "Table 12: peak GiB a GPU, 7B, 8 × A100-80GB, ZeRO-2",
        "run",
        "length",
        "plan",
        "paper",
        "error",
    )
    for cell in cells:
        amount = f"{cell.planned:.1f}" if cell.fits else f"does not fit ({cell.planned:.1f})"
        table.add_row(
            cell.run,
            str(cell.length),
            amount,
            "out of memory" if cell.paper is None else f"{cell.paper:.1f}",
            "" if cell.error is None else f"{cell.error:+.1%}",
        )
    table.caption = (
        "one constant is fitted to this table: fragments, a quarter of activations and loss"
    )
    out.table(table)

    speed = paper.speed_ups()
    table = _table("LoRA over LongLoRA, 7B", "length", "plan (FLOPs)", "paper (hours)")
    for length, hours, ratio in speed:
        table.add_row(str(length), f"{ratio:.2f}", f"{hours:.2f}")
    table.caption = "the paper's own kernels roll and regroup tensors; plan counts arithmetic only"
    out.table(table)

    reach = paper.headline()
    table = _table(
        "Does it reach …, 8 × A100-80GB, ZeRO-3?", "model", "length", "needed", "total", "answer"
    )
    for goal in reach:
        answer = "yes" if goal.total <= paper.CARD.memory else "yes, tightly"
        table.add_row(
            goal.model,
            str(goal.length),
            f"{goal.needed:.1f}",
            f"{goal.total:.1f}",
            answer if goal.fits else "no",
        )
    table.caption = "GiB a GPU; needed: tensors alone, total: what the allocator would like"
    out.table(table)
    return {
        "table_11": {str(length): kinds for length, kinds in ours.items()},
        "table_12": [{**asdict(cell), "error": cell.error} for cell in cells],
        "speedup": [
            {"length": length, "paper": hours, "planned": ratio} for length, hours, ratio in speed
        ],
        "reach": [asdict(goal) for goal in reach],
    }

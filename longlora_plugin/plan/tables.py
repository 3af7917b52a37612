"""What `plan` prints: costs by part, whether it fits and how, hours and money."""

from __future__ import annotations

from typing import Any

from longlora_plugin.plan.cost import Cost
from longlora_plugin.plan.planner import Plan

WORDS = {"halo": "S²", "ring": "ring attention", "ulysses": "Ulysses"}


def _table(title: str, *columns: str) -> Any:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    return table


def print_plan(out: Any, plan: Plan) -> None:
    """Print a plan to an `Output` of the command line."""
    _print_flops(out, plan)
    _print_memory(out, plan)
    if plan.cost:
        _print_cost(out, plan.cost, plan)
    elif plan.gpu:
        out.print(f"hours: the speed of {plan.gpu} is not known; name a GPU, such as a100-80gb")
    for note in plan.notes:
        out.print(f"note: {note}")


def _print_flops(out: Any, plan: Plan) -> None:
    counts = plan.parameters
    share = counts["trained"] / (counts["trained"] + counts["frozen"])
    out.print(
        f"{plan.base_model}, adapter: {plan.adapter or 'none (full fine-tune)'}, "
        f"sequence_len: {plan.sequence_len}"
    )
    out.print(
        f"parameters: {counts['trained']:,} trained ({share:.2%}), {counts['frozen']:,} frozen"
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


def _print_memory(out: Any, plan: Plan) -> None:
    table = _table(f"GiB on each of {plan.gpus} GPU{'s' * (plan.gpus > 1)}", "part", "GiB")
    for part, value in plan.memory.items():
        if part in ("total", "needed"):
            continue
        table.add_row(part, f"{value:.2f}")
    table.add_section()
    table.add_row("total", f"{plan.memory['total']:.2f}")
    table.add_row("needed, without fragments", f"{plan.memory['needed']:.2f}")
    out.table(table)
    if plan.host_memory:
        out.print(f"CPU memory for what leaves the GPU: {plan.host_memory:,.1f} GiB for each GPU")
    if plan.sent:
        sent = ", ".join(
            f"{WORDS[kind]} {amount / 1e6:,.1f} MB" for kind, amount in plan.sent.items()
        )
        out.print(
            f"context parallel over {plan.context_parallel} GPUs, sent by a layer's forward pass: "
            f"{sent}"
        )
    if plan.gpu:
        out.print(_verdict(plan))
        _print_remedies(out, plan)
    else:
        table = _table(f"On {plan.gpus} × …", "GPU", "fits", "longest with space", "longest")
        for row in plan.by_gpu:
            word = "no" if not row.fits else "tight" if row.tight else "yes"
            longest = (row.comfortable_sequence_len, row.largest_sequence_len)
            table.add_row(row.gpu, word, *(f"{length:,}" for length in longest))
        out.table(table)


def _print_remedies(out: Any, plan: Plan) -> None:
    if plan.fits:
        return
    if not plan.remedies:
        out.print("no change of the recipe that plan knows of would make it smaller")
        return
    table = _table("Changes, each alone", "write", "GiB needed", "fits", "it costs")
    for tried in plan.remedies:
        table.add_row(
            tried.write[0], f"{tried.needed:.1f}", "yes" if tried.fits else "no", tried.costs[0]
        )
    out.table(table)
    if plan.together:
        out.print(f"together these make it fit, {plan.together.needed:.1f} GiB:")
        for line in plan.together.write:
            out.print(f"  {line}")
    elif not any(tried.fits for tried in plan.remedies):
        out.print("all of them together do not make it fit: shorten sequence_len, or use more GPUs")


def _print_cost(out: Any, cost: Cost, plan: Plan) -> None:
    table = _table(
        f"{cost.steps:,} steps of {cost.rows_per_step} rows on {plan.gpus} × {plan.gpu}",
        "",
        "seconds a step",
        "hours",
        "GPU-hours",
        *(["price"] if cost.price else []),
    )
    rows = [("full attention throughout", "full", "full")]
    if plan.shifted_attention:
        rows.insert(0, ("this recipe (S²)", "s2", "run"))
    for name, step, run in rows:
        table.add_row(
            name,
            f"{cost.seconds_per_step[step]:,.1f}",
            f"{cost.hours[run]:,.1f}",
            f"{cost.gpu_hours[run]:,.1f}",
            *([f"{cost.price[run]:,.2f}"] if cost.price else []),
        )
    table.caption = (
        f"from {cost.steps_from}; every row full; {cost.flops_share:.0%} of {cost.peak_tflops:g} "
        f"TFLOP/s {cost.share_from} (--flops-share)"
    )
    out.table(table)


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
        f"{word}; longest sequence_len: {plan.comfortable_sequence_len:,} with space for "
        f"fragments, {plan.largest_sequence_len:,} at most"
    )

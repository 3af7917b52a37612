"""`longlora plan`: will it fit, what will it cost."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from longlora_plugin.cli.options import Finite, json_option
from longlora_plugin.cli.output import Output


@click.command("plan")
@click.argument("path", metavar="RECIPE", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--gpu", metavar="NAME", help="a100-80gb, rtx4090-24gb, …, or a size: 48gb.")
@click.option("--gpus", type=click.IntRange(min=1), default=1, show_default=True)
@click.option(
    "--rows",
    type=click.IntRange(min=1),
    help="Rows of sequence_len tokens in the dataset: the run is num_epochs of them.",
)
@click.option(
    "--flops-share",
    type=Finite(0, 1, min_open=True),
    help="Share of the GPU's peak bf16 rate that training reaches. Default: what `make gpu` "
    "measured on such a GPU, else 0.45.",
)
@click.option(
    "--price-per-gpu-hour",
    type=Finite(min=0),
    metavar="MONEY",
    help="Adds what the run costs.",
)
@json_option("Write the figures as JSON.")
@click.option("--plot", metavar="PNG", help="Memory and FLOPs against length.")
def command(
    path: Path,
    gpu: str | None,
    gpus: int,
    rows: int | None,
    json_path: str | None,
    plot: str | None,
    **cost: Any,
) -> None:
    """Parameters, FLOPs, memory, hours, money and the longest context of RECIPE.

    Needs the base model's config.json only: no weights, no GPU, no dataset. Memory is for each
    GPU. What does not fit comes with the changes that make it fit; the answer never changes the
    exit status. A recipe that `recipes check` refuses is refused.
    """
    from longlora_plugin.plan.from_recipe import base_config_of
    from longlora_plugin.plan.gpus import find_gpu
    from longlora_plugin.plan.planner import plan_run, planned_run
    from longlora_plugin.plan.tables import print_plan
    from longlora_plugin.recipes.screen import screen
    from longlora_plugin.run.recipe import read_recipe

    out = Output(json_path, plot)
    card = find_gpu(gpu) if gpu is not None else None
    given = [name for name, value in {"rows": rows, **cost}.items() if value is not None]
    if given and not (card and card.tflops):
        out.note(
            f"--{', --'.join(given).replace('_', '-')}: hours and money are planned for a GPU "
            "whose speed is known: --gpu NAME, such as a100-80gb"
        )
    recipe = read_recipe(path)
    if wrong := screen(recipe):
        raise ValueError("\n".join(wrong))
    run = planned_run(recipe, base_config_of(recipe), gpus, rows)
    plan = plan_run(recipe, run, card, **cost)
    print_plan(out, plan)
    if out.plot:
        from longlora_plugin.plan.plot import plot_plan

        plot_plan(run, plan.sequence_len, card, out.plot)
    out.write_json(asdict(plan))
    out.wrote("plot", out.plot)

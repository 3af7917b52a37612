"""What a recipe comes to on this machine: what is on, what is off, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longlora_plugin.doctor.trials import AFTER_EVALUATION, NOT_TRIED, WORKS, Trial
from longlora_plugin.run.needs import needs_of, unsupported_on
from longlora_plugin.run.recipe import asks_for_longlora
from longlora_plugin.run.summary import Fact, launch_facts

if TYPE_CHECKING:
    from longlora_plugin.recipes.check import Report


def judge(path: Path, trials: Sequence[Trial], device: Mapping[str, Any]) -> Report:
    """Check a recipe, and compare what it needs with what was tried on this machine.

    The report's facts are what is on and what is off; with its problems it cannot run here.

    Args:
        path: a YAML file.
        device: of `machine.this_device`.
    """
    from longlora_plugin.recipes.check import check_recipe

    found = check_recipe(path)
    if found.run is None:
        return found  # it says why
    recipe = found.run.recipe
    if not asks_for_longlora(recipe):
        why = "the recipe has neither adapter: longlora nor a longlora: block"
        found.facts = [Fact("LongLoRA", False, why), *launch_facts(found.run)]
    of_name = {trial.name: trial for trial in trials}
    for name, key, instead, evaluated in needs_of(recipe):
        trial = of_name.get(name + AFTER_EVALUATION * evaluated)
        if trial is None:
            continue
        if trial.state == NOT_TRIED:
            found.notes.append(f"{key} needs {trial.name}, which was not tried")
        elif trial.state != WORKS:
            found.problems.append(
                f"{key}: {trial.name} does not work here ({trial.detail}); {instead}"
            )
    found.problems += unsupported_on(device, recipe)
    return found

"""What this machine and these versions support, each tried rather than assumed; and what a recipe
comes to here: what is on, what is off, and why.

A back end works where its forward and backward pass agree with the definition of S²-Attn, written
out densely; a quantized layer where its gradient agrees with the dequantized weights, also after
an evaluation; a launcher where one step of it, in a process of its own, equals plain SGD.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longlora_plugin.doctor.machine import (
    this_device,
    unsupported_extras,
    unsupported_versions,
    versions,
)
from longlora_plugin.doctor.trials import (
    AFTER_EVALUATION,
    NOT_TRIED,
    WORKS,
    Trial,
    trials_for,
    tried,
)
from longlora_plugin.run.needs import needs_of, unsupported_on
from longlora_plugin.run.recipe import asks_for_longlora, read_yaml
from longlora_plugin.run.summary import Fact, launch_facts


@dataclass
class Diagnosis:
    """Everything the doctor says.

    Attributes:
        versions: package → version; None where it is not installed.
        device: `kind` (`cuda` or `cpu`), `name`, `memory` in GiB, `bf16`, `count`.
        trials: what was tried on this machine.
        recipe: the recipe's path, if one was given.
        findings: what is on and what is off in it.
        problems: why the recipe cannot run here; none where it can.
        notes: what else to know.
        runs: whether the recipe can run here; None without one.
    """

    versions: dict[str, str | None]
    device: dict[str, Any]
    trials: list[Trial]
    recipe: str | None = None
    findings: list[Fact] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    runs: bool | None = None


def diagnose(
    recipe: Path | None = None,
    *,
    quick: bool = False,
    progress: Callable[[str], None] = lambda name: None,
) -> Diagnosis:
    """Try what this machine can do and, if given, say what a recipe comes to on it.

    Args:
        recipe: a YAML file.
        quick: leave out what starts processes or compiles kernels; the recipe is then not judged
            by those.
        progress: called with the name of each trial before it.

    Raises:
        ValueError: the recipe cannot be read.
    """
    if recipe is not None:
        read_yaml(recipe)  # a wrong path is told before a minute of trials
    device = this_device()
    trials = []
    for name, (attempt, slow) in trials_for(device["kind"]).items():
        progress(name)
        trials.append(
            Trial(name, NOT_TRIED, "left out by --quick")
            if quick and slow
            else tried(name, attempt)
        )
    diagnosis = Diagnosis(versions(), device, trials)
    diagnosis.problems += unsupported_versions(diagnosis.versions)
    diagnosis.notes += unsupported_extras(diagnosis.versions)
    if recipe is not None:
        progress(str(recipe))
        _judge(recipe, diagnosis)
        diagnosis.runs = not diagnosis.problems
    return diagnosis


def _judge(path: Path, diagnosis: Diagnosis) -> None:
    """Check a recipe, and compare what it needs with what was tried on this machine."""
    from longlora_plugin.recipes.check import check_recipe

    found = check_recipe(path)
    diagnosis.recipe, diagnosis.findings = str(path), found.facts
    diagnosis.problems += found.problems
    diagnosis.notes += found.notes
    if found.run is None:
        return  # the problems say why
    recipe = found.run.recipe
    if not asks_for_longlora(recipe):
        why = "the recipe has neither adapter: longlora nor a longlora: block"
        diagnosis.findings = [Fact("LongLoRA", False, why), *launch_facts(found.run)]
    of_name = {trial.name: trial for trial in diagnosis.trials}
    for name, key, instead, evaluated in needs_of(recipe):
        trial = of_name.get(name + AFTER_EVALUATION * evaluated)
        if trial is None:
            continue
        if trial.state == NOT_TRIED:
            diagnosis.notes.append(f"{key} needs {trial.name}, which was not tried")
        elif trial.state != WORKS:
            diagnosis.problems.append(
                f"{key}: {trial.name} does not work here ({trial.detail}); {instead}"
            )
    diagnosis.problems += unsupported_on(diagnosis.device, recipe)

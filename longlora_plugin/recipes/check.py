"""Is a recipe right? Everything that can be told without weights, a GPU or, for a local base, a
network: YAML, our block, RoPE, the group against the length, Axolotl's own schema, the modules to
train, the layers S²-Attn covers, and memory where a GPU is named.

Each part is asked on its own, so that one report holds all that is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from longlora_plugin.plan.from_recipe import training_of
from longlora_plugin.plan.gpus import Gpu, find_gpu
from longlora_plugin.plan.planner import Plan, plan_run, planned_run
from longlora_plugin.plan.shape import meta_model
from longlora_plugin.run.base_model import base_config_of
from longlora_plugin.run.built import built_of, trained_modules
from longlora_plugin.run.checks import told_in
from longlora_plugin.run.manifest import check_start
from longlora_plugin.run.prepare import PreparedRun, prepare_run
from longlora_plugin.run.recipe import Recipe, asks_for_longlora, read_yaml, wrong_kinds
from longlora_plugin.run.summary import Built, Fact, facts

AXOLOTLS_DEFAULTS = "Auto-enabling"
"""How those of its warnings begin that only say what it does by default."""

PLUGIN = "longlora_plugin.LongLoRAPlugin"

ASSUMED_GPU = "a100-80gb"
"""Whose capabilities Axolotl's schema is told where no GPU is named."""

FIRST_WITH_BF16 = 80
FIRST_WITH_FP8 = 90


@dataclass
class Report:
    """What was found about one recipe; most fields are those of `recipes.CheckedRow`.

    Attributes:
        facts: what the recipe comes to, in words; none where something is wrong with the run.
        run: the run; None where the recipe cannot be read.
    """

    path: Path
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    resolved: dict[str, Any] = field(default_factory=dict)
    facts: list[Fact] = field(default_factory=list)
    run: PreparedRun | None = None

    @property
    def ok(self) -> bool:
        return not self.problems


def check_recipe(
    path: str | Path,
    *,
    gpu: str | None = None,
    gpus: int = 1,
    base_config: str | None = None,
    strict: bool = False,
) -> Report:
    """Check a recipe.

    Args:
        path: its YAML file.
        gpu: a GPU it has to fit, as `plan` knows it.
        gpus: how many of them.
        base_config: folder or name whose config.json is read instead of the base model's.
        strict: warnings are problems.

    Raises:
        ValueError: `gpu` is unknown. What is wrong with the recipe is in the report.
    """
    card = find_gpu(gpu) if gpu else None
    report = Report(Path(path))
    try:
        raw = read_yaml(path)
    except ValueError as error:
        report.problems.append(str(error))
        return report
    report.problems += repeated_keys(Path(path))

    check_plugin_line(raw, report)
    config = _base_config(raw, base_config, report)
    run = report.run = prepare_run(raw, config)
    report.problems += [*wrong_names(raw), *run.problems]
    if asks_for_longlora(raw):
        _describe(raw, run, report)
        if run.block.held_out:
            from longlora_plugin.evaluation.data import check_held_out_of

            with told_in(report.problems):
                check_held_out_of(run)
        _check_data(raw, run, report)
    schema_is_fine = _check_schema(raw, run, gpu or ASSUMED_GPU, gpus, report)

    recipe = Recipe(Path(path), raw, run.block if asks_for_longlora(raw) else None)
    if config is not None:
        built = _check_model(run, config, report)
        report.facts = facts(run, built) if asks_for_longlora(raw) else []
        if built and schema_is_fine:
            _check_memory(recipe, config, card, gpus, report)
    _check_deepspeed(recipe, report)
    if strict:
        report.problems += report.warnings
        report.warnings = []
    # Two parts may refuse the same value, each with its own advice: `key: got value; …`.
    unique: dict[str, str] = {}
    for text in report.problems:
        unique.setdefault(text.split(";")[0], text)
    report.problems = list(unique.values())
    report.notes = list(dict.fromkeys(report.notes))
    return report


def _check_data(raw: dict[str, Any], run: PreparedRun, report: Report) -> None:
    from longlora_plugin.recipes.data_lengths import document_lengths, missing_files

    report.warnings += missing_files(raw)
    if not run.base_context or run.problems:
        return
    found = document_lengths(raw, run.base_context)
    if found is None:
        return
    lengths, where = found
    report.resolved["data"] = asdict(lengths) | {"share_beyond": lengths.share_beyond}
    report.notes.append(f"datasets: {lengths} ({where})")
    if warning := lengths.warning():
        report.warnings.append(f"datasets: {warning}")


def capabilities_of(gpu: str, gpus: int) -> dict[str, Any]:
    """What Axolotl's schema wants to know of the machine, for GPUs called `gpu`."""
    known = find_gpu(gpu).capability
    return {
        "bf16": known >= FIRST_WITH_BF16,
        "fp8": known >= FIRST_WITH_FP8,
        "tf32": known >= FIRST_WITH_BF16,
        "n_gpu": gpus,
        "compute_capability": f"sm_{known}",
    }


def repeated_keys(path: Path) -> list[str]:
    """Keys that a recipe gives twice; YAML takes the last one in silence."""
    from ruamel.yaml import YAML
    from ruamel.yaml.constructor import DuplicateKeyError
    from ruamel.yaml.error import YAMLError

    try:
        YAML().load(path)
    except DuplicateKeyError as error:
        return [f"{error.problem}, line {error.problem_mark.line + 1}: the last one wins; keep one"]
    except YAMLError:
        pass  # PyYAML, which Axolotl reads recipes with, took it
    return []


def _plugins(raw: Mapping[str, Any]) -> list[str]:
    names = raw.get("plugins") or []
    return [str(name) for name in names] if isinstance(names, list) else [str(names)]


def check_plugin_line(raw: Mapping[str, Any], report: Report) -> None:
    """Whether Axolotl will load this plugin where the recipe asks for it."""
    asks = asks_for_longlora(raw)
    named = any(name.startswith("longlora_plugin") for name in _plugins(raw))
    if asks and not named:
        from longlora_plugin.host.compat import LOADS_INSTALLED_PLUGINS

        missing = f"plugins: {PLUGIN} is not among them"
        if LOADS_INSTALLED_PLUGINS:
            report.notes.append(
                f"{missing}; this Axolotl loads it all the same, 0.19 and 0.20 would not"
            )
        else:
            report.problems.append(
                f"{missing}, so Axolotl would refuse adapter: longlora and ignore the longlora "
                f"block; write\nplugins:\n  - {PLUGIN}"
            )
    if named and not asks:
        report.notes.append(
            "the plugin is loaded but does nothing: the recipe has neither adapter: longlora nor "
            "a longlora: block"
        )


def wrong_names(raw: Mapping[str, Any]) -> list[str]:
    """What is wrong with a recipe that asks for LongLoRA by another name."""
    problems, adapter = [], raw.get("adapter")
    if adapter != "longlora" and re.sub(r"\W|_", "", str(adapter)).lower() == "longlora":
        problems.append(f"adapter: got {adapter!r}; write adapter: longlora")
    if raw.get("s2_attention"):
        problems.append(
            "s2_attention: Axolotl removed it; remove the line: adapter: longlora, or a "
            "longlora: block, trains with shifted attention"
        )
    return problems


def _base_config(raw: Mapping[str, Any], stand_in: str | None, report: Report) -> Any:
    if raw.get("base_model") == "":
        report.problems.append("base_model: got ''; write a name or a path")
    if not raw.get("base_model") or wrong_kinds(raw).keys() & {"base_model", "base_model_config"}:
        return None  # the schema or the run says so
    name = str(raw.get("base_model_config") or raw["base_model"])
    if stand_in:
        raw = {**raw, "base_model_config": stand_in}
    try:
        return base_config_of(raw)
    except ValueError as told:
        if told.__context__ is None and not stand_in:
            report.problems.append(str(told))
            return None
        # The message is for a run, which needs the base; here the reason under it decides.
        error = told.__context__ or told
    why = (str(error).strip().splitlines() or [repr(error)])[0]
    if stand_in:
        report.problems.append(f"--base-config: cannot read {stand_in}: {why}")
    elif _is_the_recipes_fault(name, error):
        report.problems.append(f"base_model: cannot read the config of {name}: {why}")
    else:
        report.notes.append(
            f"the config of {name} could not be read here ({why}): RoPE against its context, "
            "its attention layers and memory are not checked. Give a folder with its "
            "config.json: --base-config FOLDER"
        )
    return None


def _is_the_recipes_fault(name: str, error: BaseException) -> bool:
    """Whether the base does not exist, rather than being out of reach."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    if Path(name).exists():
        return True
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, GatedRepoError):
            return False
        if isinstance(seen, RepositoryNotFoundError):
            return True
        seen = seen.__cause__ or seen.__context__
    return not isinstance(error, OSError)


def _describe(raw: Mapping[str, Any], run: PreparedRun, report: Report) -> None:
    """What the recipe comes to, and what of it has no effect."""
    report.notes += run.warnings
    with told_in(report.problems):
        report.notes += check_start(run)
    if run.rope is not None and not run.problems:
        report.resolved = {
            "adapter": run.adapter,
            "group_size": run.group_size,
            "base_context": run.base_context,
            "target_context": run.target_context,
            "rope_preset": run.rope.preset,
            "rope_reason": run.rope.chosen_by_auto,
            "rope_parameters": run.rope.rope_parameters,
        }
    if run.group_size and run.block.full_attention_below >= run.target_context:
        report.notes.append(
            f"longlora.full_attention_below: {run.block.full_attention_below} covers every row of "
            f"sequence_len: {run.target_context}, so shifted attention never runs"
        )
    if run.adapter != "longlora" and "trainable" in run.block.model_fields_set:
        report.notes.append(
            f"longlora.trainable is not used with adapter: {run.adapter}; it is with "
            "adapter: longlora"
        )


def _check_schema(
    raw: Mapping[str, Any], run: PreparedRun, gpu: str, gpus: int, report: Report
) -> bool:
    from longlora_plugin.host.schema import check_schema

    wrong = wrong_kinds(raw)  # were reported, and Axolotl's schema crashes on them
    lowered = {key: value for key, value in raw.items() if key not in wrong}
    lowered.update(run.updates)
    if "base_model" in wrong:
        lowered["base_model"] = str(raw["base_model"])
    named = _plugins(raw)
    if asks_for_longlora(raw):
        lowered["longlora"] = run.block.model_dump(exclude_none=True)
        if not any(name.startswith("longlora_plugin") for name in named):
            lowered["plugins"] = [*named, PLUGIN]
    found = check_schema(lowered, capabilities_of(gpu, gpus))
    # Axolotl refuses some keys that were refused above, with their remedy.
    told = [re.escape(text.split(":")[0]) for text in (*run.problems, *wrong_names(raw))]
    again = re.compile("|".join(rf"`?{key}\b" for key in told) or "(?!)", re.IGNORECASE)
    report.problems += [text for text in found.problems if not again.match(text)]
    report.notes += [text for text in found.warnings if not text.startswith(AXOLOTLS_DEFAULTS)]
    report.notes += [f"plugins: {each}: its keys are not checked" for each in found.plugins_missing]
    for key, near in found.unknown.items():
        hint = f"; did you mean {' or '.join(near)}?" if near else "."
        text = f"{key} is not a key of Axolotl{hint}"
        if key == "longlora" or any(f"`{key}`" in problem for problem in found.problems):
            continue  # was reported
        if found.plugins_missing and not near:
            report.notes.append(f"{text} It may be one of a plugin that is not installed here")
        else:
            report.problems.append(f"{text} Axolotl would ignore it in silence")
    return not found.problems


def _check_model(run: PreparedRun, base_config: Any, report: Report) -> Built | None:
    """Ask the model, built without weights, which modules train and which layers S²-Attn covers."""
    try:
        model = meta_model(run.config_of(base_config), trust_remote_code=run.remote_code)
    except Exception as error:
        report.notes.append(f"the model cannot be built from its config here: {error}")
        return None
    if run.problems:
        return None
    try:
        built = built_of(run, model)
    except ValueError as error:
        report.problems.append(str(error))
        return None
    report.notes += [
        f"longlora.trainable: {kind}: this model has none"
        for kind, names in trained_modules(run, model).items()
        if not names
    ]
    report.notes += [
        f"shifted attention leaves out {count} of the layers: {reason}"
        for reason, count in built.skipped.items()
    ]
    return built


def _check_memory(recipe: Recipe, config: Any, card: Gpu | None, gpus: int, report: Report) -> None:
    with told_in(report.problems):
        run = planned_run(recipe, config, gpus)
        report.notes += run.notes
        if card is not None:
            _check_fits(plan_run(recipe, run, card), card, report)


def _check_fits(plan: Plan, card: Gpu, report: Report) -> None:
    where = f"{plan.gpus} × {card.name} ({card.memory:g} GiB each)"
    needed, total = plan.memory["needed"], plan.memory["total"]
    report.resolved["memory"] = {
        "gpu": card.name,
        "gpus": plan.gpus,
        "needed": needed,
        "total": total,
    }
    longest = f"the longest sequence_len that fits is {plan.largest_sequence_len:,}"
    if not plan.fits:
        report.problems.append(f"does not fit {where}: {needed:.1f} GiB of tensors; {longest}")
    elif plan.tight:
        report.notes.append(
            f"may just fit {where}: {needed:.1f} GiB of tensors, {total:.1f} GiB as allocators "
            f"usually fragment; sequence_len: {plan.comfortable_sequence_len:,} leaves space for it"
        )
    else:
        report.notes.append(f"fits {where}: {total:.1f} GiB; {longest}")


def _check_deepspeed(recipe: Recipe, report: Report) -> None:
    path = recipe.raw.get("deepspeed")
    if not isinstance(path, str) or Path(path).is_file():
        return
    alone = Recipe(recipe.path, {"deepspeed": path}, None)
    with told_in(report.problems):
        report.notes += training_of(alone, 1)[1]
    if (recipe.path.parent / path).is_file():
        report.notes.append(
            f"deepspeed: {path} is next to the recipe, but Axolotl looks for it from the folder "
            "it is started in"
        )

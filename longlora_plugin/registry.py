"""The plugin manager: collects what the built-ins and third-party packages provide, by name.

A package that cannot be loaded, raises, returns something of the wrong kind, or takes a name that
exists is reported by its distribution's name and skipped. The run fails only where the recipe asks
for a name that nobody provides, and the error then says which skipped package may have it.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import pluggy

from longlora_plugin import hookspecs

ENTRY_POINT_GROUP = "longlora"
BUILTIN = "longlora-plugin"
BUILTINS = {
    "longlora_rope_presets": "longlora_plugin.rope.presets",
    "longlora_attention_patterns": "longlora_plugin.attention.layout",
    "longlora_trainable_modules": "longlora_plugin.adapter.modules",
    "longlora_recipes": "longlora_plugin.recipes",
}
"""Hook → module of this package that implements it, imported when the hook is first asked."""
CALLED = {
    "longlora_rope_presets": "RoPE preset",
    "longlora_attention_patterns": "attention pattern",
    "longlora_trainable_modules": "kind of trainable modules",
    "longlora_recipes": "recipe",
}
"""Hook → how errors call what it provides."""
LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Offer:
    """One thing that a package provides.

    Attributes:
        value: what the hook's specification says, checked.
        owner: the distribution's name.
    """

    value: Any
    owner: str


@dataclass(frozen=True)
class Skipped:
    """Something of a package that was left out.

    Attributes:
        owner: the distribution's name.
        hook: the hook it is about; None where the whole package was left out.
        name: the name it is about; None where all that the hook returns was left out.
        reason: what is wrong with it.
    """

    owner: str
    hook: str | None
    name: str | None
    reason: str

    def __str__(self) -> str:
        what = " ".join(filter(None, (self.hook, self.name and repr(self.name))))
        return f"{what} of {self.owner}: {self.reason}" if what else f"{self.owner}: {self.reason}"


class Rejected(ValueError):
    """A value that is not what its hook's specification asks for."""


def manager() -> pluggy.PluginManager:
    """The manager with every loadable entry point registered, once a process."""
    return _load()[0]


def hook_names() -> list[str]:
    """Every hook there is a specification of."""
    return [
        name
        for name, function in vars(hookspecs).items()
        if inspect.isfunction(function) and hasattr(function, "longlora_spec")
    ]


def survey(hook: str) -> tuple[dict[str, Offer], list[Skipped]]:
    """Everything that hook `hook` provides, by name, and what was left out of it.

    Built-ins come first and cannot be replaced; after them, distributions by their name.
    """
    offers: dict[str, Offer] = {}
    skipped: list[Skipped] = []
    _register_builtin(hook)
    implementations = getattr(manager().hook, hook).get_hookimpls()
    for implementation in sorted(
        implementations,
        key=lambda impl: (_distribution(impl.plugin_name) != BUILTIN, impl.plugin_name),
    ):
        owner = _distribution(implementation.plugin_name)
        try:
            answer = implementation.function()
            if not isinstance(answer, Mapping):
                raise Rejected(f"it returned {_short(answer)}, not a mapping of names")
            answer = dict(answer)
        except (Exception, SystemExit) as error:
            reason = str(error) if isinstance(error, Rejected) else f"it raised {error!r}"
            skipped.append(Skipped(owner, hook, None, reason))
            continue
        for name, value in answer.items():
            try:
                if not isinstance(name, str) or not name:
                    raise Rejected("a name must be a text that recipes can write")
                if name in offers:
                    raise Rejected(f"the name is taken by {offers[name].owner}")
                checked = CHECKS[hook](name, value, owner)
            except Rejected as error:
                skipped.append(Skipped(owner, hook, str(name), str(error)))
            else:
                offers[name] = Offer(value if owner == BUILTIN else checked, owner)
    return offers, skipped


def provided(hook: str) -> dict[str, Any]:
    """Everything that hook `hook` (`longlora_rope_presets`, …) provides, by name.

    What had to be left out is logged as a warning, once a process.
    """
    offers, skipped = survey(hook)
    for problem in (*broken_packages(), *skipped):
        _warn_once(str(problem))
    return {name: offer.value for name, offer in offers.items()}


def find(hook: str, name: str) -> Any:
    """The one thing called `name` that hook `hook` provides.

    Raises:
        ValueError: nobody provides it; names the nearest and all valid names, and every package
            that was skipped and may provide it.
    """
    choices = provided(hook)
    if name in choices:
        return choices[name]
    near = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    message = f"unknown {CALLED[hook]} {name!r}; {hint}valid: {', '.join(sorted(choices))}"
    suspects = [
        str(problem)
        for problem in (*broken_packages(), *survey(hook)[1])
        if problem.name in (None, name)
    ]
    if suspects:
        message += ". An installed package that may provide it was skipped: " + "; ".join(suspects)
    raise ValueError(message)


def broken_packages() -> tuple[Skipped, ...]:
    """Packages, or hooks of theirs that do not exist, left out when the manager was made."""
    return _load()[1]


@functools.lru_cache(maxsize=1)
def _load() -> tuple[pluggy.PluginManager, tuple[Skipped, ...]]:
    plugins = pluggy.PluginManager("longlora")
    plugins.add_hookspecs(hookspecs)
    skipped: list[Skipped] = []
    for entry_point in sorted(entry_points(group=ENTRY_POINT_GROUP), key=_registered_name):
        name = _registered_name(entry_point)
        owner = _distribution(name)
        try:
            plugin = entry_point.load()
        except (Exception, SystemExit) as error:
            skipped.append(
                Skipped(owner, None, None, f"{entry_point.value} does not load: {error!r}")
            )
            continue
        try:
            plugins.register(plugin, name=name)
        except Exception as error:
            # pluggy may have taken some of its hooks before it met the wrong one.
            if plugins.get_name(plugin) == name:
                plugins.unregister(plugin)
            skipped.append(Skipped(owner, None, None, f"{entry_point.value} was refused: {error}"))
            continue
        skipped += _unknown_hooks(plugins, plugin, owner, entry_point.value)
    return plugins, tuple(skipped)


def _register_builtin(hook: str) -> None:
    module = BUILTINS.get(hook)
    if module and not manager().has_plugin(f"{BUILTIN} [{hook}]"):
        manager().register(importlib.import_module(module), name=f"{BUILTIN} [{hook}]")


def _unknown_hooks(
    plugins: pluggy.PluginManager, plugin: Any, owner: str, value: str
) -> list[Skipped]:
    callers = plugins.get_hookcallers(plugin) or []
    if not callers:
        reason = f"{value} implements no hook; mark its functions with @longlora_plugin.hookspecs"
        return [Skipped(owner, None, None, f"{reason}.hookimpl")]
    return [
        Skipped(
            owner, caller.name, None, f"there is no such hook; hooks: {', '.join(hook_names())}"
        )
        for caller in callers
        if not caller.has_spec()
    ]


def _registered_name(entry_point: EntryPoint) -> str:
    owner = entry_point.dist.name if entry_point.dist else entry_point.value
    return f"{owner} [{entry_point.name}]"


def _distribution(plugin_name: str) -> str:
    return plugin_name.split(" [")[0]


@functools.lru_cache(maxsize=256)
def _warn_once(message: str) -> None:
    LOG.warning("longlora: skipped %s", message)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "…"


# ---- what each hook may return --------------------------------------------------------------


def _guarded(function: Callable[..., Any], label: str) -> Callable[..., Any]:
    """`function`, with any error but its own ValueErrors turned into one that names its package."""

    @functools.wraps(function, updated=())
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except ValueError:
            raise
        except Exception as error:
            raise ValueError(f"{label} failed: {error!r}") from error

    return call


def _function(value: Any, kind: str) -> Callable[..., Any]:
    if not callable(value):
        raise Rejected(f"got {_short(value)}; {kind} is a function")
    function: Callable[..., Any] = value
    return function


def _preset(name: str, value: Any, owner: str) -> Any:
    return _guarded(_function(value, "a preset"), f"RoPE preset {name!r} of {owner}")


def _pattern(name: str, value: Any, owner: str) -> Any:
    from longlora_plugin.attention.layout import AttentionPattern

    if not isinstance(value, AttentionPattern) or not callable(value.shifts):
        raise Rejected(f"got {_short(value)}; a pattern is an AttentionPattern(name, shifts)")
    return replace(value, shifts=_guarded(value.shifts, f"attention pattern {name!r} of {owner}"))


def _module_kind(name: str, value: Any, owner: str) -> Any:
    label = f"kind of trainable modules {name!r} of {owner}"
    select = _guarded(_function(value, "a kind of trainable modules"), label)

    def names_of(model: Any) -> list[str]:
        names = select(model)
        if not isinstance(names, list | tuple | set | frozenset) or not all(
            isinstance(each, str) for each in names
        ):
            raise ValueError(f"{label} returned {_short(names)}, not a list of module names")
        existing = {each for each, _ in model.named_modules()}
        unknown = sorted(set(names) - existing)
        if unknown:
            raise ValueError(
                f"{label} returned {unknown[0]!r}, which is no module of this model; "
                "return names as model.named_modules() gives them"
            )
        return list(names) if isinstance(names, list | tuple) else sorted(names)

    return names_of


def _recipe(name: str, value: Any, owner: str) -> Any:
    if not isinstance(value, str | Path):
        raise Rejected(f"got {_short(value)}; a recipe is the path of a YAML file")
    if not Path(value).is_file():
        raise Rejected(f"there is no file {value}")
    return Path(value)


CHECKS: dict[str, Callable[[str, Any, str], Any]] = {
    "longlora_rope_presets": _preset,
    "longlora_attention_patterns": _pattern,
    "longlora_trainable_modules": _module_kind,
    "longlora_recipes": _recipe,
}
"""Hook → function (name, value, owner) that returns the value to use, or raises Rejected."""

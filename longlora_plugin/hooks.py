"""The plugin manager: collects what the built-ins and third-party packages provide, by name.

A third-party package that cannot be loaded, raises, returns something that is not a mapping, or
takes a name that exists is reported by its distribution's name and skipped. The run fails only
where the recipe asks for a name that nobody provides.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping
from functools import lru_cache
from importlib.metadata import entry_points
from typing import Any

import pluggy

from longlora_plugin import builtins, hookspecs

ENTRY_POINT_GROUP = "longlora"
LOG = logging.getLogger(__name__)


@lru_cache(maxsize=1)
def manager() -> pluggy.PluginManager:
    """The manager with the built-ins and every loadable entry point registered, once a process."""
    plugins = pluggy.PluginManager("longlora")
    plugins.add_hookspecs(hookspecs)
    plugins.register(builtins, name="longlora-plugin")
    for entry_point in entry_points(group=ENTRY_POINT_GROUP):
        if entry_point.value == builtins.__name__:
            continue
        distribution = entry_point.dist.name if entry_point.dist else entry_point.value
        try:
            plugins.register(entry_point.load(), name=distribution)
        except Exception as error:
            LOG.warning("longlora: skipping %s, it does not load: %s", distribution, error)
    return plugins


def provided(hook: str) -> dict[str, Any]:
    """Everything that hook `hook` (`longlora_rope_presets`, …) provides, by name.

    Built-ins come first and cannot be replaced.
    """
    found: dict[str, Any] = {}
    plugins = manager()
    implementations = getattr(plugins.hook, hook).get_hookimpls()
    for implementation in sorted(
        implementations, key=lambda impl: impl.plugin_name != "longlora-plugin"
    ):
        owner = implementation.plugin_name
        try:
            offer = implementation.function()
        except Exception as error:
            LOG.warning("longlora: skipping %s of %s, it raised: %r", hook, owner, error)
            continue
        if not isinstance(offer, Mapping):
            LOG.warning(
                "longlora: skipping %s of %s, it returned %r, not a mapping", hook, owner, offer
            )
            continue
        for name, value in offer.items():
            if name in found:
                LOG.warning("longlora: %s of %s: %r is already taken, skipped", hook, owner, name)
            else:
                found[name] = value
    return found


def find(hook: str, name: str, *, what: str) -> Any:
    """The one thing called `name` that hook `hook` provides.

    Args:
        what: how the error calls it, for example "RoPE preset".

    Raises:
        ValueError: nobody provides it; names the nearest and all valid names.
    """
    choices = provided(hook)
    if name in choices:
        return choices[name]
    near = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"unknown {what} {name!r}; {hint}valid: {', '.join(sorted(choices))}")

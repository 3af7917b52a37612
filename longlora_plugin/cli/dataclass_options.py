"""Options of a command from the fields of a dataclass, which state their defaults and help."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any, get_type_hints

import click

Command = Callable[..., Any]


def dataclass_options(kind: type) -> Callable[[Command], Command]:
    """Decorator that adds an option for each field of `kind` whose metadata has a `help`."""
    hints = get_type_hints(kind)

    def add(function: Command) -> Command:
        for field in reversed(fields(kind)):
            facts = field.metadata
            if "help" not in facts:
                continue
            multiple = isinstance(field.default, tuple)
            flag = facts.get("flag", field.name.replace("_", "-"))
            function = click.option(
                f"--{flag}",
                field.name,
                type=_type(hints[field.name], facts),
                default=None if multiple else field.default,
                callback=_default_if_none(field.default) if multiple else None,
                multiple=multiple,
                show_default=field.default is not None and not multiple,
                help=facts["help"],
            )(function)
        return function

    return add


def _default_if_none(default: tuple[str, ...]) -> Callable[..., tuple[str, ...]]:
    return lambda context, parameter, value: tuple(value) or default


def _type(hint: Any, facts: Any) -> Any:
    if "choices" in facts:
        return click.Choice(facts["choices"])
    for plain in (int, float):
        if hint in (plain, plain | None):
            if not {"min", "max", "below"} & set(facts):
                return plain
            limits = click.IntRange if plain is int else click.FloatRange
            top = facts.get("below", facts.get("max"))
            return limits(facts.get("min"), top, max_open="below" in facts)
    return str

"""Options of a command from the fields of dataclasses, so that a default is stated once."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import click

Command = Callable[..., Any]


class Listed(click.ParamType):
    """A list separated by commas: of words, if nothing else is said."""

    name = "words"
    example = "words with commas"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[Any, ...]:
        if isinstance(value, tuple):
            return value
        try:
            found = tuple(self.one(part.strip()) for part in str(value).split(",") if part.strip())
        except ValueError:
            self.fail(f"{value!r}: write {self.example}")
        return found or self.fail(f"{value!r} names nothing: write {self.example}")

    def one(self, text: str) -> Any:
        return text


class Finite(click.FloatRange):
    """A number within limits that is neither infinite nor NaN."""

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value} is not a number.", param, ctx)
        return number


class Integers(Listed):
    """Whole numbers; `8k` is 8192."""

    name = "integers"
    example = "whole numbers with commas, for example 512,1024 or 8k"

    def one(self, text: str) -> int:
        return int(text[:-1]) * 1024 if text.lower().endswith("k") else int(text)


class Depths(Listed):
    """Shares between 0 and 1, or `random`."""

    name = "depths"
    example = "shares with commas, for example 0,0.5,1, or random"

    def one(self, text: str) -> Any:
        return text if text == "random" else float(text)


def options_of(kind: type) -> Callable[[Command], Command]:
    """Give a command an option for each field of a dataclass that has a help text."""
    hints = get_type_hints(kind)

    def decorate(command: Command) -> Command:
        for each in reversed(dataclasses.fields(kind)):
            if "help" in each.metadata:
                command = _option(each, hints[each.name])(command)
        return command

    return decorate


def options_from(*settings: type) -> Callable[[Command], Command]:
    """Give a command the options of dataclasses; it is called with one object for each of them.

    The objects come first, in the order of `settings`.
    """

    def decorate(function: Command) -> Command:
        @functools.wraps(function)
        def call(**given: Any) -> Any:
            made = [
                kind(**{each.name: given.pop(each.name) for each in dataclasses.fields(kind)})
                for kind in settings
            ]
            return function(*made, **given)

        command: Command = call
        for kind in reversed(settings):
            command = options_of(kind)(command)
        return command

    return decorate


def _option(each: dataclasses.Field[Any], hint: Any) -> Callable[[Any], Any]:
    facts, default = each.metadata, each.default
    more: dict[str, Any] = {"help": facts["help"], "metavar": facts.get("metavar")}
    name = f"--{facts.get('flag', each.name.replace('_', '-'))}"
    if hint is bool:
        return click.option(name, each.name, is_flag=True, default=default, **more)
    if facts.get("repeatable"):
        kind = _click_type(str, facts)
        return click.option(
            name,
            each.name,
            type=kind,
            multiple=True,
            callback=lambda ctx, param, value: tuple(value) or default,
            **more,
        )
    if default not in (None, ()):
        more["show_default"] = (
            ",".join(f"{part:g}" for part in default) if isinstance(default, tuple) else True
        )
    return click.option(name, each.name, type=_click_type(hint, facts), default=default, **more)


def _click_type(hint: Any, facts: Mapping[str, Any]) -> Any:
    if "choices" in facts:
        return click.Choice(facts["choices"])
    if get_origin(hint) in (Union, UnionType):
        hint = next(kind for kind in get_args(hint) if kind is not NoneType)
    if get_origin(hint) is Literal:
        return click.Choice(get_args(hint))
    if get_origin(hint) is tuple:
        of = get_args(hint)[0]
        return Integers() if of is int else Listed() if of is str else Depths()
    if hint in (int, float) and {"min", "max", "below"} & facts.keys():
        limits = click.IntRange if hint is int else click.FloatRange
        top = facts.get("below", facts.get("max"))
        return limits(facts.get("min"), top, max_open="below" in facts)
    return hint


def json_option(help: str) -> Callable[[Any], Any]:
    """`--json FILE` of a command that writes one result at its end."""
    return click.option("--json", "json_path", metavar="FILE", help=f"{help} -: standard output.")

"""Options of a command from the fields of dataclasses, so that a default is stated once."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import click


class Listed(click.ParamType):
    """A list separated by commas."""

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

    example = "words with commas"

    def one(self, text: str) -> Any:
        return text


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


class Words(Listed):
    """Words."""

    name = "words"


def options_from(*settings: type) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command an option for each field; it is called with one object for each dataclass.

    The objects come first, in the order of `settings`.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def command(**given: Any) -> Any:
            made = [
                kind(**{each.name: given.pop(each.name) for each in dataclasses.fields(kind)})
                for kind in settings
            ]
            return function(*made, **given)

        for kind in reversed(settings):
            hints = get_type_hints(kind)
            for each in reversed(dataclasses.fields(kind)):
                command = _option(each, hints[each.name])(command)
        return command

    return decorate


def _option(each: dataclasses.Field[Any], hint: Any) -> Callable[[Any], Any]:
    more: dict[str, Any] = {"help": each.metadata["help"], "metavar": each.metadata.get("metavar")}
    name = each.metadata.get("flag", f"--{each.name.replace('_', '-')}")
    if hint is bool:
        return click.option(name, each.name, is_flag=True, default=each.default, **more)
    if each.metadata.get("repeatable"):
        return click.option(name, each.name, multiple=True, **more)
    if each.default not in (None, ()):
        default = each.default
        more["show_default"] = (
            ",".join(f"{part:g}" for part in default) if isinstance(default, tuple) else True
        )
    kind = _click_type(hint, each.metadata.get("minimum"))
    return click.option(name, each.name, type=kind, default=each.default, **more)


def _click_type(hint: Any, minimum: int | None) -> Any:
    if get_origin(hint) in (Union, UnionType):
        hint = next(kind for kind in get_args(hint) if kind is not NoneType)
    if get_origin(hint) is Literal:
        return click.Choice(get_args(hint))
    if get_origin(hint) is tuple:
        of = get_args(hint)[0]
        return Integers() if of is int else Words() if of is str else Depths()
    if hint is int and minimum is not None:
        return click.IntRange(min=minimum)
    return hint


def json_option(help: str) -> Callable[[Any], Any]:
    """`--json FILE` of a command that writes one result at its end."""
    return click.option("--json", "json_path", metavar="FILE", help=f"{help} -: standard output.")

"""Fields of dataclasses that are options of the command: default and help are stated once."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def option(default: Any, help: str, **more: Any) -> Any:
    """A field with the help text of its option.

    Args:
        more: `flag`, where the option has another name; `choices`; `min`, `max` and `below` of
            numbers; `repeatable` for a tuple that is given one by one.
    """
    return field(default=default, metadata={"help": help, **more})

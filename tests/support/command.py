"""The command line, `longlora …`, in this process."""

from __future__ import annotations

from typing import Any

from click.testing import CliRunner, Result

from longlora_plugin.cli import longlora


def invoke(*arguments: object, **options: Any) -> Result:
    return CliRunner().invoke(longlora, [str(argument) for argument in arguments], **options)


def done(*arguments: object) -> Result:
    """What a command that must succeed gave."""
    result = invoke(*arguments)
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    return result


def refused(*arguments: object) -> str:
    """What a command said that must fail, without a traceback."""
    result = invoke(*arguments)
    assert result.exit_code != 0
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.output

"""`longlora …` and `axolotl longlora …`: one file a command, each imported when it is used.

The commands only parse options, call one part of the package, and print; torch and transformers
are imported inside them, so that `--help` stays instant.
"""

from __future__ import annotations

import errno
import importlib
import os
import sys
from typing import Any

import click

COMMANDS = {
    "import": "Original LongLoRA checkpoints to a PEFT adapter.",
    "extend-base": "A base model's folder with a run's RoPE, for PEFT's own loaders.",
    "doctor": "What this machine and these versions support, each tried; and a recipe here.",
    "longqa": "Long-document question-answer data: build it, describe it.",
    "recipes": "Recipes to start from; check any recipe.",
    "plan": "Will a recipe fit, what will it cost; from the config alone.",
    "eval": "Perplexity by context length and position.",
    "serve-check": "How inference engines read what was saved; what serves it right.",
    "bench": "RULER and other benchmarks of lm-eval, by context length.",
    "passkey": "Retrieval of a hidden number by length and depth.",
}
"""Command → its line in `--help`; its module in this package has the same name."""
MODULES = {
    "import": "import_original",
    "serve-check": "serve_check",
    "extend-base": "extend_base",
}
"""Where a module cannot have its command's name."""


class LazyGroup(click.Group):
    """A group that imports a command's module when that command is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"{__name__}.{MODULES.get(cmd_name, cmd_name)}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(sorted(COMMANDS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        # ValueError and OSError say what a user can fix; a traceback would bury the message.
        try:
            return super().invoke(ctx)
        except ValueError as error:
            raise click.ClickException(str(error)) from error
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise
            where = f"{error.filename}: " if error.filename else ""
            raise click.ClickException(f"{where}{error.strerror or error}") from error


@click.group(cls=LazyGroup)
@click.pass_context
def longlora(ctx: click.Context) -> None:
    """Plan, check and measure long-context fine-tuning (LongLoRA)."""
    if ctx.parent is not None:
        take_axolotls_banner_back()


def take_axolotls_banner_back() -> None:
    """Remove Axolotl's banner from a file that standard output goes to.

    `axolotl` prints it before any command is imported. What has gone into a pipe stays there:
    `longlora` prints none.
    """
    art = sys.modules.get("axolotl.cli.art")
    if not getattr(art, "HAS_PRINTED_LOGO", False):
        return
    banner = f"{getattr(art, 'AXOLOTL_LOGO', '')}\n".encode()
    try:
        sys.stdout.flush()
        output = sys.stdout.fileno()
        begin = os.lseek(output, 0, os.SEEK_CUR) - len(banner)
        with open(f"/dev/fd/{output}", "rb") as file:
            file.seek(begin)
            if file.read() == banner:
                os.ftruncate(output, begin)
                os.lseek(output, begin, os.SEEK_SET)
    except (OSError, ValueError):
        pass  # a pipe, a terminal, or no file of the system at all

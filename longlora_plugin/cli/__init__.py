"""`axolotl longlora …`: one file a command, each imported when it is used.

The commands only parse options, call one room, and print; torch and transformers are imported
inside them, so that `--help` stays instant.
"""

from __future__ import annotations

import importlib
from typing import Any

import click

COMMANDS = {
    "import": "Original LongLoRA checkpoints to a PEFT adapter.",
    "doctor": "What this machine and these versions support, each tried; and a recipe here.",
    "longqa": "Long-document question-answer data: build it, describe it.",
    "recipes": "Recipes to start from; check any recipe.",
    "plan": "Will a recipe fit, what will it cost; from the config alone.",
    "eval": "Perplexity by context length and position.",
    "passkey": "Retrieval of a hidden number by length and depth.",
}
"""Command → its line in `--help`; its module in this package has the same name."""
MODULES = {"import": "import_original"}
"""Where a module cannot have its command's name (a keyword)."""


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
        # Rooms raise ValueError for what a user can mend; a traceback would bury the message.
        try:
            return super().invoke(ctx)
        except (ValueError, FileNotFoundError) as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=LazyGroup)
def longlora() -> None:
    """Plan, check and measure long-context fine-tuning (LongLoRA)."""

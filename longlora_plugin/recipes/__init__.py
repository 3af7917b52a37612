"""Recipes to start from: those shipped here, and those that installed packages add.

In a wheel they are in `recipes/configs`; a checkout has them in `examples/configs`, where people
look for them. Loads no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated as Key
from typing import Any, TypedDict

from longlora_plugin.hookspecs import hookimpl


@dataclass(frozen=True)
class Listed:
    """A recipe that can be started from.

    Attributes:
        path: its YAML file.
        owner: the distribution it comes from.
    """

    path: Path
    owner: str

    @property
    def summary(self) -> str:
        """The first sentence of its leading comment."""
        words: list[str] = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            text = line.removeprefix("#").strip()
            if not line.startswith("#") or not text:
                break
            words.append(text)
        first, stop, _ = " ".join(words).partition(". ")
        return first + stop.strip()


ListedRow = TypedDict(
    "ListedRow",
    {
        "name": Key[str, "what `recipes init` takes"],
        "path": Key[str, "its file"],
        "base_model": Key[str, "the recipe's"],
        "sequence_len": Key[int | None, "the recipe's"],
        "summary": Key[str, "what it is for"],
        "from": Key[str, "the package it comes from"],
    },
)
"""A row of `recipes list --json`."""


class CheckedRow(TypedDict):
    """A row of `recipes check --json`."""

    path: Key[str, "the recipe's file"]
    ok: Key[bool, "whether nothing is wrong with it"]
    problems: Key[list[str], "what has to be changed"]
    warnings: Key[list[str], "what makes the run useless; problems with `--strict`"]
    notes: Key[list[str], "what to know, and what could not be checked here"]
    resolved: Key[dict[str, Any], "adapter, group size, contexts, RoPE, memory; empty if undecided"]


@cache
def configs_dir() -> Path:
    """Folder of the shipped recipes.

    Raises:
        FileNotFoundError: the installation has none.
    """
    package = Path(__file__).resolve().parent
    for folder in (package / "configs", package.parents[1] / "examples" / "configs"):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(
        f"this installation has no recipes: neither {package / 'configs'} nor examples/configs; "
        "install longlora-plugin again"
    )


@hookimpl
def longlora_recipes() -> dict[str, Path]:
    """The recipes of this package: name → YAML file."""
    return {path.stem: path for path in sorted(configs_dir().glob("*.yml"))}


def available() -> dict[str, Listed]:
    """Every recipe of this package and of installed ones, by name."""
    from longlora_plugin.registry import provided, survey

    provided("longlora_recipes")  # warns of what is skipped
    offers, _ = survey("longlora_recipes")
    return {name: Listed(Path(offer.value), offer.owner) for name, offer in offers.items()}


def recipe_path(name: str) -> Path:
    """The YAML file of the recipe called `name`.

    Raises:
        ValueError: there is none; names the nearest.
    """
    from longlora_plugin.registry import find

    return Path(find("longlora_recipes", name))

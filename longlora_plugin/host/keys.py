"""The names of Axolotl's keys, without importing Axolotl (which takes seconds)."""

from __future__ import annotations

import runpy
from importlib.util import find_spec
from pathlib import Path

OPTIONS = Path("cli", "config_options.py")
"""Axolotl's generated list of command-line options, one for each key of a recipe."""
NOT_OPTIONS = {
    "capabilities",
    "env_capabilities",
    "model_config",
    "overrides_of_model_config",
    "model_kwargs",
    "model_revision",
    "revision_of_model",
    "model_type",
    "type_of_model",
}
"""Keys that Axolotl has no option for."""


def known_keys() -> frozenset[str]:
    """Keys of the installed Axolotl, without those of its plugins; none where it has no list."""
    axolotl = find_spec("axolotl")
    folders = axolotl.submodule_search_locations if axolotl else None
    found = (Path(folder, OPTIONS) for folder in folders or ())
    path = next((each for each in found if each.is_file()), None)
    if path is None:
        return frozenset()
    options = runpy.run_path(str(path)).get("AXOLOTL_CONFIG_CLI_OPTIONS", ())
    flags = (name.split("/")[0] for names, *_ in options for name in names)
    keys = {flag.lstrip("-").split(".")[0].replace("-", "_") for flag in flags}
    return frozenset(keys | NOT_OPTIONS) if keys else frozenset()

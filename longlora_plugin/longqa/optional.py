"""Packages of the `longqa` extra, imported where they are used."""

from __future__ import annotations

import importlib
from typing import Any

INSTALL = "pip install 'longlora-plugin[longqa]'"


def require(package: str, purpose: str) -> Any:
    """Import an optional package.

    Raises:
        ValueError: it is not installed; says the line that installs it.
    """
    try:
        return importlib.import_module(package)
    except ImportError:
        raise ValueError(f"{purpose} needs {package}; {INSTALL}") from None

"""Versions and device of this machine."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

DISTRIBUTION = "longlora-plugin"
PACKAGES = (
    "axolotl",
    "transformers",
    "peft",
    "torch",
    "accelerate",
    "bitsandbytes",
    "deepspeed",
    "flash-attn",
)


def versions() -> dict[str, str | None]:
    """Versions of Python, this package and the packages it works with."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in (DISTRIBUTION, *PACKAGES):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def unsupported_versions(found: Mapping[str, str | None]) -> list[str]:
    """Which installed packages are not of a version that this package is made for."""
    from packaging.requirements import Requirement

    problems = []
    for line in requires(DISTRIBUTION) or ():
        wanted = Requirement(line)
        installed = found.get(wanted.name)
        if wanted.marker is None and installed and not wanted.specifier.contains(installed, True):
            problems.append(
                f"{wanted.name} {installed} is installed; this package is made for "
                f'{wanted.specifier}: pip install "{wanted.name}{wanted.specifier}"'
            )
    return problems


def this_device() -> dict[str, Any]:
    """What training would run on: a CUDA (or ROCm) GPU, else the CPU."""
    import torch

    if not torch.cuda.is_available():
        return {
            "kind": "cpu",
            "name": platform.processor() or platform.machine(),
            "count": os.cpu_count(),
            "memory": None,
            "bf16": False,
        }
    properties = torch.cuda.get_device_properties(0)
    return {
        "kind": "cuda",
        "name": properties.name,
        "count": torch.cuda.device_count(),
        "memory": round(properties.total_memory / 2**30, 1),
        "bf16": torch.cuda.is_bf16_supported(),
    }

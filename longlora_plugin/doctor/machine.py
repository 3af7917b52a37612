"""Versions and device of this machine."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, requires
from typing import Any

from packaging.requirements import Requirement

from longlora_plugin.artifacts.manifest import versions as installed

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
    """Versions of Python, this package and the packages it works with; None: not installed."""
    names = (DISTRIBUTION, *PACKAGES)
    return {"python": platform.python_version(), **dict.fromkeys(names), **installed(names)}


def unsupported_versions(found: Mapping[str, str | None]) -> list[str]:
    """Which installed packages are not of a version that this package is made for."""
    return list(_unmet(DISTRIBUTION, "this package", found))


def unsupported_extras(found: Mapping[str, str | None]) -> list[str]:
    """Which installed optional packages are not of a version that the installed Axolotl allows."""
    return list(_unmet("axolotl", f"axolotl {found['axolotl']}", found, extra=True))


def _unmet(
    distribution: str, made: str, found: Mapping[str, str | None], *, extra: bool = False
) -> Iterator[str]:
    """What to do about requirements of an installed package that the versions found do not meet.

    Args:
        extra: those of its extras instead of those it always has.
    """
    try:
        lines = requires(distribution) or []
    except PackageNotFoundError:
        return  # run from a checkout that is not installed
    for wanted in map(Requirement, lines):
        if extra:
            asked = wanted.marker is not None and "extra ==" in str(wanted.marker)
        else:
            asked = wanted.marker is None or wanted.marker.evaluate()
        version = found.get(wanted.name)
        if asked and version and not wanted.specifier.contains(version, prereleases=True):
            yield (
                f"{wanted.name} {version} is installed; {made} is made for {wanted.specifier}: "
                f'pip install "{wanted.name}{wanted.specifier}"'
            )


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
        "bf16": torch.cuda.is_bf16_supported(including_emulation=False),
    }

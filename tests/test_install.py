"""What `make install` installs is what the project asks for, for each supported pair."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCKS = sorted((ROOT / "constraints").glob("*.txt"))


def pins(lock: Path) -> dict[str, Version]:
    lines = re.findall(r"^([\w.-]+)==(\S+)$", lock.read_text(), re.MULTILINE)
    return {name: Version(version) for name, version in lines}


def asked(extras: list[str]) -> list[Requirement]:
    """Every requirement of the project with `extras`, its own extras resolved."""
    found = [Requirement(text) for text in PROJECT["dependencies"]]
    while extras:
        for text in PROJECT["optional-dependencies"][extras.pop()]:
            requirement = Requirement(text)
            if requirement.name == PROJECT["name"]:
                extras += requirement.extras
            else:
                found.append(requirement)
    return found


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_supported_python_has_its_constraints():
    supported = {line.split()[-1] for line in PROJECT["classifiers"] if "Python :: 3." in line}
    assert {re.match(r"py(\d)(\d+)-", lock.name).groups() for lock in LOCKS} == {
        tuple(version.split(".")) for version in supported
    }


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.stem)
def test_constraints_have_a_version_that_satisfies_every_requirement(lock):
    pinned = {normal(name): version for name, version in pins(lock).items()}
    missing = {
        str(requirement): str(pinned.get(normal(requirement.name)))
        for requirement in asked(["dev", "docs"])
        if not requirement.specifier.contains(
            pinned.get(normal(requirement.name), "0"), prereleases=True
        )
    }
    assert not missing, "run: make lock"
    assert str(pinned["axolotl"]).startswith(lock.stem.rpartition("axolotl")[2] + ".")

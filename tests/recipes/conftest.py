"""Base models that recipes name: config.json files in folders."""

from __future__ import annotations

from pathlib import Path

import base_configs
import pytest


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bases")
    for name in base_configs.CONFIGS:
        base_configs.write(name, root)
    return root

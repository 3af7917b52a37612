"""transformers 4 rotates by what transformers 5 does, from a config.json of this package.

Needs an environment of its own, by default `.venv-transformers-4` at the root of the repository:

    python3.11 -m venv .venv-transformers-4
    .venv-transformers-4/bin/pip install "torch==2.13.0" "transformers==4.57.6"

LONGLORA_TRANSFORMERS_4 names the Python of another one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rope_families import FAMILIES, TARGET, options_for

from longlora_plugin.rope import PRESETS, apply_rope, resolve_rope, rope_parameters_of, write_rope

ROOT = Path(__file__).parents[2]
PYTHON = os.environ.get("LONGLORA_TRANSFORMERS_4", str(ROOT / ".venv-transformers-4/bin/python"))
PROBE = Path(__file__).with_name("probe_transformers_4.py")

pytestmark = pytest.mark.skipif(
    not Path(PYTHON).is_file(), reason=f"no environment with transformers 4: {PYTHON} is missing"
)

TYPES = ("llama", "mistral", "qwen2", "qwen3", "gpt_neox", "phi", "phi3", "olmo2")
TAKEN_ONLY = {
    "phi3": ("ntk", "theta", "longrope", "none"),
    "olmo2": ("linear", "dynamic", "ntk", "theta", "none"),  # by its class in transformers 4
}
CASES = [
    (family, preset)
    for family in TYPES
    for preset in PRESETS
    if preset not in ("pi", "auto") and preset in TAKEN_ONLY.get(family, PRESETS)
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder for each case; both versions have written what they rotate by, in `rotary.npz`."""
    root = tmp_path_factory.mktemp("transformers-4")
    made = {}
    for family, preset in CASES:
        make, _, dim, _ = FAMILIES[family]
        config = make()
        apply_rope(config, resolve_rope(preset, config, TARGET, **options_for(preset, dim)))
        for way in ("old", "new"):
            folder = root / f"{family}-{preset}-{way}"
            config.save_pretrained(folder)
            made[family, preset, way] = folder
        path = made[family, preset, "old"] / "config.json"
        stored = json.loads(path.read_text())
        both = write_rope(stored, rope_parameters_of(config), config.max_position_embeddings)
        path.write_text(json.dumps(both))
    for python, way in ((PYTHON, "old"), (sys.executable, "new")):
        chosen = [str(folder) for (_, _, each), folder in made.items() if each == way]
        subprocess.run([python, str(PROBE), str(TARGET), *chosen], check=True, timeout=300)
    return made


@pytest.mark.parametrize(("family", "preset"), CASES)
def test_transformers_4_rotates_by_what_transformers_5_does(folders, family, preset):
    old = np.load(folders[family, preset, "old"] / "rotary.npz")
    new = np.load(folders[family, preset, "new"] / "rotary.npz")
    for name in ("cos", "sin"):
        assert old[name].shape == new[name].shape
        np.testing.assert_allclose(old[name], new[name], rtol=0, atol=1e-4)

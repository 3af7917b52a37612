"""The example package that adds to every hook, installed by pip."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import base_configs
import pytest

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "plugin-package"


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment variables under which the example package is installed."""
    root = tmp_path_factory.mktemp("example")
    source, target = root / "source", root / "site"
    shutil.copytree(EXAMPLE, source)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    command += ["--no-build-isolation", "--target", str(target), str(source)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    assert (target / "longlora_example-0.1.0.dist-info" / "entry_points.txt").is_file()
    path = os.pathsep.join([str(target), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path}


def run_in(environment: dict[str, str], *command: str, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, *command], env=environment, cwd=cwd, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# Runs where the package is installed: each thing it adds, used the way a run uses it.
PROBE = """
import json, torch
from transformers import LlamaConfig, LlamaForCausalLM
from longlora_plugin.attention import enable_shifted_attention
from longlora_plugin.registry import find, survey
from longlora_plugin.rope import resolve_rope

hooks = ["longlora_rope_presets", "longlora_attention_patterns", "longlora_trainable_modules",
         "longlora_recipes"]
added = {hook: [name for name, offer in survey(hook)[0].items()
                if offer.owner == "longlora-example"] for hook in hooks}
skipped = [str(problem) for hook in hooks for problem in survey(hook)[1]]
config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
rope = resolve_rope("exact", config, 96)
torch.manual_seed(0)
model = LlamaForCausalLM(config).train()
kinds = {}
for tied in (False, True):
    config.tie_word_embeddings = tied
    kinds[str(tied)] = find("longlora_trainable_modules", "head")(
        LlamaForCausalLM(config))

def seen_from_the_second_group(name):
    # Does a token of the first group change anything in the second?
    pattern = find("longlora_attention_patterns", name)
    handle = enable_shifted_attention(model, group_size=8, pattern=pattern)
    rows = torch.arange(16)[None].repeat(2, 1)
    rows[1, 6] = 60
    with torch.no_grad():
        a, b = model(rows).logits
    handle.remove()
    return not torch.equal(a[8:], b[8:])

print(json.dumps({"added": added, "skipped": skipped, "rope": rope.rope_parameters, "kinds": kinds,
    "groups": seen_from_the_second_group("groups"), "s2": seen_from_the_second_group("s2")}))
"""


def test_the_example_package_works_once_pip_has_installed_it(environment, tmp_path):
    told: dict[str, Any] = json.loads(run_in(environment, "-c", PROBE, cwd=tmp_path))
    assert told["added"] == {
        "longlora_rope_presets": ["exact"],
        "longlora_attention_patterns": ["groups"],
        "longlora_trainable_modules": ["head"],
        "longlora_recipes": ["example-groups"],
    }
    assert told["skipped"] == []
    assert told["rope"] == {"rope_type": "linear", "factor": 1.5, "rope_theta": 10000.0}
    assert told["kinds"] == {"False": ["lm_head"], "True": []}
    assert told["groups"] is False
    assert told["s2"] is True


def test_the_example_packages_recipe_is_listed_started_and_checked(environment, tmp_path):
    base = base_configs.write("meta-llama/Llama-2-7b-hf", tmp_path)
    command = ("-m", "longlora_plugin.cli", "recipes")
    run_in(environment, *command, "list", "--json", "list.json", cwd=tmp_path)
    rows = {row["name"]: row for row in json.loads((tmp_path / "list.json").read_text())}
    assert rows["example-groups"]["from"] == "longlora-example"
    assert rows["qlora-24gb"]["from"] == "longlora-plugin"
    run_in(environment, *command, "init", "example-groups", cwd=tmp_path)
    check = ("check", "example-groups.yml", "--base-config", str(base), "--json", "found.json")
    run_in(environment, *command, *check, cwd=tmp_path)
    found = json.loads((tmp_path / "found.json").read_text())[0]
    assert found["resolved"]["rope_parameters"]["factor"] == 1.5


def test_the_example_packages_recipe_is_refused_where_it_is_not_installed(tmp_path):
    from longlora_plugin.recipes.check import check_recipe

    base = base_configs.write("meta-llama/Llama-2-7b-hf", tmp_path)
    recipe = EXAMPLE / "longlora_example" / "recipes" / "example-groups.yml"
    problems = "\n".join(check_recipe(recipe, base_config=str(base)).problems)
    for name in ("'exact'", "'groups'", "'head'"):
        assert name in problems


def test_importing_the_example_package_loads_no_torch(environment, tmp_path):
    code = "import sys, longlora_example; assert 'torch' not in sys.modules"
    run_in(environment, "-c", code, cwd=tmp_path)

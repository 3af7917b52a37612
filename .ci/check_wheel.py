"""Run by `.ci/wheel` outside of a checkout: every listed recipe is complete there."""

import subprocess
import sys
from pathlib import Path

import yaml
from click.testing import CliRunner

import longlora_plugin
from longlora_plugin.cli import longlora
from longlora_plugin.recipes import available

checkout = Path(sys.argv[1])
package = Path(longlora_plugin.__file__).parent
assert not package.is_relative_to(checkout), f"{package} is the checkout's"
assert (package / "py.typed").is_file(), "type checkers do not read it"

for name in available():
    done = CliRunner().invoke(longlora, ["recipes", "init", name, "--output", f"{name}.yml"])
    assert done.exit_code == 0, f"{name}: {done.output}"
    recipe = yaml.safe_load(Path(f"{name}.yml").read_text())
    assert "/" in recipe["base_model"], f"{name}: base_model is not the name of a hub"
    for key in ("base_model", "deepspeed"):
        value = recipe.get(key) or ""
        inside = value.startswith(("examples/", "outputs/", "deepspeed"))
        assert not inside or Path(value).exists(), f"{name}: {key}: {value} is not there"

command = [sys.executable, "-m", "axolotl.cli.main", "longlora", "recipes", "list"]
listed = subprocess.run(command, capture_output=True, text=True)
assert "qlora-24gb" in listed.stdout, listed.stdout + listed.stderr
print(f"{len(available())} recipes of the wheel are complete")

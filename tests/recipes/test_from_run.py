"""`recipes init --from`: a recipe from what somebody trained, in a folder or on the hub."""

from __future__ import annotations

import pytest
import yaml
from click.testing import CliRunner
from hub import put_on_hub

from longlora_plugin.artifacts.manifest import Manifest, find_manifest, write_manifest
from longlora_plugin.cli import longlora

RECIPE = {
    "base_model": "someone/base-7b",
    "plugins": ["longlora_plugin.LongLoRAPlugin"],
    "adapter": "longlora",
    "sequence_len": 32768,
    "longlora": {"rope": "yarn"},
    "datasets": [{"path": "someone/books", "type": "completion"}],
    "output_dir": "outputs/theirs",
    "hub_model_id": "someone/theirs",
    "axolotl_config_path": "/home/someone/recipe.yml",
}
MANIFEST = Manifest(
    "someone/base-7b",
    32768,
    base_context=4096,
    adapter="longlora",
    rope_preset="yarn",
    steps=1000,
    recipe=RECIPE,
    versions={"axolotl": "0.19.0"},
)


@pytest.fixture
def theirs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "shared" / "theirs"
    folder.mkdir(parents=True)
    write_manifest(folder, MANIFEST)
    return folder


def init(*arguments: object):
    return CliRunner().invoke(longlora, ["recipes", "init", *map(str, arguments)])


def test_their_recipe_becomes_ones_own(theirs, tmp_path):
    done = init("--from", theirs)
    assert done.exit_code == 0, done.output
    assert "wrote theirs.yml" in done.output
    assert "hub_model_id" in done.output
    text = (tmp_path / "theirs.yml").read_text()
    assert text.startswith(f"# From {theirs}: 4,096 → 32,768 tokens, RoPE yarn, 1000 steps.\n")
    assert "axolotl 0.19.0" in text
    left_out = ("axolotl_config_path", "hub_model_id", "output_dir")
    kept = {key: value for key, value in RECIPE.items() if key not in left_out}
    assert yaml.safe_load(text) == {**kept, "output_dir": "outputs/theirs"}


def test_settings_are_applied_and_a_folder_that_is_there_is_not_written_to(theirs, tmp_path):
    (tmp_path / "outputs" / "mine").mkdir(parents=True)
    done = init("--from", theirs, "--output", "mine.yml", "--set", "longlora.rope=linear")
    assert done.exit_code == 0, done.output
    raw = yaml.safe_load((tmp_path / "mine.yml").read_text())
    assert raw["longlora"] == {"rope": "linear"}
    assert raw["output_dir"] == "outputs/mine-1"
    assert init("--from", theirs, "--output", "mine.yml").exit_code == 2
    assert init("--from", theirs, "--output", "mine.yml", "--force").exit_code == 0


def test_a_model_on_the_hub(theirs, tmp_path, monkeypatch):
    put_on_hub(theirs, "someone/base-7b-32k", tmp_path / "hub", monkeypatch)
    done = init("--from", "someone/base-7b-32k")
    assert done.exit_code == 0, done.output
    raw = yaml.safe_load((tmp_path / "base-7b-32k.yml").read_text())
    assert raw["longlora"] == {"rope": "yarn"}
    assert raw["output_dir"] == "outputs/base-7b-32k"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--from", "shared"), "shared has no longlora.json"),
        (("--from", "nobody/nothing"), "no folder nobody/nothing, and no model of that name"),
        (("--from", "a/b/c"), "no folder a/b/c, and no model of that name"),
        (("qlora-24gb", "--from", "shared/theirs"), "NAME of a listed recipe, or --from RUN"),
        ((), "NAME of a listed recipe, or --from RUN"),
        (("--from", "shared/theirs", "--set", "adapter.x=1"), "adapter.x=1"),
    ],
)
def test_what_cannot_be_is_one_error(theirs, tmp_path, arguments, message):
    done = init(*arguments)
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())
    assert not list(tmp_path.glob("*.yml"))


def test_a_run_without_a_recipe_and_a_damaged_file_say_so(theirs):
    write_manifest(theirs, Manifest("base", 64))
    assert "has no recipe" in init("--from", theirs).output
    (theirs / "longlora.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        find_manifest(str(theirs))

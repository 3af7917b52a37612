"""The documentation is what the code is: generated pages, the picture, recipes and commands."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import click
import generate
import pytest
import s2_picture
import yaml
from reference import allowed

from longlora_plugin.args import parse_block
from longlora_plugin.cli import longlora
from longlora_plugin.recipes import longlora_recipes as shipped

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
NAMES = [path.relative_to(DOCS).as_posix() for path in PAGES]


@pytest.mark.parametrize("page", generate.PAGES)
def test_generated_page_is_up_to_date(page):
    committed = (DOCS / page).read_text(encoding="utf-8")
    assert committed == generate.PAGES[page](), "run: python docs/generate.py"


def test_the_picture_shows_what_the_code_does_now():
    from PIL import Image

    with Image.open(s2_picture.PICTURE) as picture:
        assert picture.info["Description"] == s2_picture.fingerprint(), (
            "run: python docs/generate.py"
        )
        assert picture.size[0] > 1000


def test_the_pictures_masks_are_the_definition():
    for _, documents, shift in s2_picture.panels():
        lengths = [size for _, size in documents]
        expected = allowed(lengths, s2_picture.GROUP, shifted=shift > 0).tolist()
        assert s2_picture.mask(documents, shift) == expected
    assert [shift for _, _, shift in s2_picture.panels()] == [0, 4, 0, 4]


def test_every_page_is_in_the_navigation_once():
    navigation = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    listed = re.findall(r"[\w/.-]+\.md", navigation)
    assert sorted(listed) == sorted(set(NAMES))


def code_blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("path", [ROOT / "README.md", *PAGES], ids=lambda path: path.name)
def test_yaml_in_the_docs_is_valid_and_so_is_every_longlora_block_in_it(path):
    for block in code_blocks(path, "yaml"):
        loaded = yaml.safe_load(block.replace("…", ""))
        if isinstance(loaded, dict) and "longlora" in loaded:
            parse_block(loaded["longlora"])
    for inline in re.findall(r"`longlora: (\{[^`…]*\})`", path.read_text()):
        parse_block(yaml.safe_load(inline))


@pytest.mark.parametrize("path", [ROOT / "README.md", *PAGES], ids=lambda path: path.name)
def test_commands_in_the_docs_exist_with_their_options(path):
    text = "\n".join(code_blocks(path, "bash"))
    for line in re.sub(r"\\\n", " ", text).splitlines():
        found = re.match(r"(?:(?:axolotl )?longlora|.*-m longlora_plugin\.cli) (.*)", line)
        if not found:
            continue
        words = found[1].split("#")[0].split()
        command: click.Command = longlora
        while isinstance(command, click.Group):
            context = click.Context(command)
            command = command.get_command(context, words[0])
            assert command is not None, line
            words = words[1:]
        known = {name for parameter in command.params for name in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known, line


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_code_fits_on_a_page_of_the_site(path):
    if path.name == "hooks.md":
        return  # the example package's own source
    kinds = ("bash", "yaml", "python", "json")
    lines = "\n".join(block for kind in kinds for block in code_blocks(path, kind)).splitlines()
    assert [line for line in lines if len(line) > 76] == []


def test_the_site_keeps_braces_at_the_end_of_a_tables_cell():
    extensions = (ROOT / "mkdocs.yml").read_text().partition("\nmarkdown_extensions:\n")[2]
    assert "attr_list" not in extensions  # it takes {trainable: []} for attributes


def test_recipes_named_in_the_docs_exist():
    text = "\n".join(path.read_text() for path in [ROOT / "README.md", *PAGES])
    started = set(re.findall(r"recipes (?:init|show) (\w[\w.-]*)", text)) - {
        "NAME",
        "example-groups",
    }
    assert started
    assert started <= set(shipped())


def test_the_table_of_costs_is_what_its_command_prints():
    from benchmarks.cost_table import markdown

    assert markdown() in (ROOT / "README.md").read_text()


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("material", reason="needs: pip install 'longlora-plugin[docs]'")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "site" / "explanation" / "s2-attention.png").is_file()


def test_files_named_on_the_architecture_page_exist():
    text = (DOCS / "explanation/architecture.md").read_text()
    named = set(re.findall(r"`([\w/]+\.py)`", text))
    package = ROOT / "longlora_plugin"
    missing = {name for name in named if not any((d / name).is_file() for d in (package, ROOT))}
    assert named
    assert not missing

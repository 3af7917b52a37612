"""The hooks: packages that are broken in every way, and what every hook has to have."""

from __future__ import annotations

import ast
import importlib
import inspect
import logging
import sys
import textwrap
from pathlib import Path

import pytest
import tiny
from transformers import LlamaConfig

from longlora_plugin import hookspecs, registry
from longlora_plugin.run.prepare import prepare_run

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "plugin-package"
HOOKS = registry.hook_names()


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Function (distribution, code, entry point) that puts a package on the path, as pip would."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def put(distribution: str, code: str | None, target: str | None = None) -> None:
        module = distribution.replace("-", "_")
        if code is not None:
            (tmp_path / f"{module}.py").write_text(
                "from longlora_plugin.hookspecs import hookimpl\n" + textwrap.dedent(code)
            )
        info = tmp_path / f"{module}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1\n")
        (info / "entry_points.txt").write_text(f"[longlora]\nit = {target or module}\n")
        _forget()

    yield put
    for name in [name for name in sys.modules if name.startswith("broken_") or name == "good"]:
        del sys.modules[name]
    monkeypatch.undo()
    _forget()


def _forget() -> None:
    registry._load.cache_clear()
    registry._warn_once.cache_clear()


def names_by_hook() -> dict[str, list[str]]:
    return {hook: sorted(registry.provided(hook)) for hook in HOOKS}


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == registry.__name__]


# ---- a broken package is named and skipped ---------------------------------------------------

BROKEN = {
    "does not exist": (None, "longlora_rope_presets", "No module named"),
    "raises while it is imported": ("1 / 0", "longlora_rope_presets", "ZeroDivisionError"),
    "exits while it is imported": ("raise SystemExit(3)", "longlora_rope_presets", "SystemExit"),
    "has no hooks": ("x = 1", "longlora_rope_presets", "implements no hook"),
    "misspells a hook": (
        """
        @hookimpl
        def longlora_rope_preset():
            return {"mine": print}
        """,
        "longlora_rope_presets",
        "there is no such hook",
    ),
    "wants an argument": (
        """
        @hookimpl
        def longlora_rope_presets(model):
            return {"mine": print}
        """,
        "longlora_rope_presets",
        "was refused",
    ),
    "raises in a hook": (
        """
        @hookimpl
        def longlora_rope_presets():
            raise RuntimeError("no luck")
        """,
        "longlora_rope_presets",
        "no luck",
    ),
    "exits in a hook": (
        """
        @hookimpl
        def longlora_recipes():
            raise SystemExit(3)
        """,
        "longlora_recipes",
        "SystemExit",
    ),
    "returns nothing": (
        """
        @hookimpl
        def longlora_attention_patterns():
            pass
        """,
        "longlora_attention_patterns",
        "returned None, not a mapping",
    ),
    "returns a list": (
        """
        @hookimpl
        def longlora_recipes():
            return ["mine"]
        """,
        "longlora_recipes",
        "not a mapping",
    ),
    "returns a preset that is no function": (
        """
        @hookimpl
        def longlora_rope_presets():
            return {"mine": {"rope_type": "linear"}}
        """,
        "longlora_rope_presets",
        "a preset is a function",
    ),
    "returns a pattern that is a function": (
        """
        @hookimpl
        def longlora_attention_patterns():
            return {"mine": lambda heads, group_size: [0] * heads}
        """,
        "longlora_attention_patterns",
        "a pattern is an AttentionPattern",
    ),
    "returns module names instead of a function": (
        """
        @hookimpl
        def longlora_trainable_modules():
            return {"mine": ["lm_head"]}
        """,
        "longlora_trainable_modules",
        "is a function",
    ),
    "returns a recipe that does not exist": (
        """
        @hookimpl
        def longlora_recipes():
            return {"mine": "/nowhere/mine.yml"}
        """,
        "longlora_recipes",
        "there is no file /nowhere/mine.yml",
    ),
    "returns a recipe's text": (
        """
        @hookimpl
        def longlora_recipes():
            return {"mine": {"base_model": "x"}}
        """,
        "longlora_recipes",
        "is the path of a YAML file",
    ),
}


@pytest.mark.parametrize("how", sorted(BROKEN))
def test_a_package_that_is_broken_is_named_and_skipped_and_the_error_suspects_it(
    how, install, caplog
):
    before = names_by_hook()
    code, hook, reason = BROKEN[how]
    install("broken-one", code)
    with caplog.at_level(logging.WARNING):
        assert names_by_hook() == before
        names_by_hook()
    told = warnings_of(caplog)
    assert len(told) == 1  # once a process, not at every look
    assert "broken-one" in told[0]
    assert reason in told[0]
    with pytest.raises(ValueError, match=r"unknown .* 'mine'") as error:
        registry.find(hook, "mine")
    assert "broken-one" in str(error.value)
    assert reason in str(error.value)


def test_a_name_that_is_no_text_is_skipped_and_its_neighbour_kept(install, caplog):
    code = """
    @hookimpl
    def longlora_rope_presets():
        return {3: print, "": print, "mine": print}
    """
    install("broken-one", code)
    with caplog.at_level(logging.WARNING):
        assert "mine" in registry.provided("longlora_rope_presets")
    told = warnings_of(caplog)
    assert len(told) == 2
    assert all("a name must be a text" in message for message in told)


def test_a_built_in_cannot_be_replaced(install, caplog):
    from longlora_plugin.rope import PRESETS

    code = """
    @hookimpl
    def longlora_rope_presets():
        return {"yarn": print, "mine": print}
    """
    install("broken-one", code)
    with caplog.at_level(logging.WARNING):
        found = registry.provided("longlora_rope_presets")
    assert found["yarn"] is PRESETS["yarn"]
    assert "mine" in found
    assert "'yarn' of broken-one: the name is taken by longlora-plugin" in caplog.text


def test_of_two_packages_with_one_name_the_first_by_name_has_it(install, caplog):
    code = """
    @hookimpl
    def longlora_rope_presets():
        return {"mine": lambda request: {"rope_type": "linear", "factor": %d}}
    """
    install("broken-b", code % 7)
    install("broken-a", code % 5)
    with caplog.at_level(logging.WARNING):
        preset = registry.find("longlora_rope_presets", "mine")
    assert preset(None)["factor"] == 5
    assert "'mine' of broken-b: the name is taken by broken-a" in caplog.text


def test_a_run_goes_on_with_broken_packages_and_fails_only_if_it_needs_one(install):
    install("broken-one", BROKEN["raises in a hook"][0])
    recipe = {"base_model": "x", "adapter": "longlora", "sequence_len": 8192}
    config = LlamaConfig(max_position_embeddings=4096)
    assert prepare_run(recipe, config).checked().rope.rope_parameters["factor"] == 2
    with pytest.raises(ValueError, match=r"'mine'.*skipped.*broken-one.*no luck"):
        prepare_run({**recipe, "longlora": {"rope": "mine"}}, config).checked()
    # Its patterns were never in question.
    with pytest.raises(ValueError, match="unknown attention pattern") as error:
        prepare_run({**recipe, "longlora": {"attention_pattern": "mine"}}, config).checked()
    assert "broken-one" not in str(error.value)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("return request.nothing", "failed: AttributeError"),
        ("return 3", "returned 3"),
        ("raise ValueError('needs option a')", "needs option a"),
    ],
)
def test_a_preset_that_fails_when_used_is_one_clear_error(install, body, says):
    code = f"""
    def preset(request):
        {body}

    @hookimpl
    def longlora_rope_presets():
        return {{"mine": preset}}
    """
    install("broken-one", code)
    recipe = {"base_model": "x", "adapter": "longlora", "sequence_len": 8192}
    mine = {**recipe, "longlora": {"rope": "mine"}}
    with pytest.raises(ValueError, match=says) as error:
        prepare_run(mine, LlamaConfig(max_position_embeddings=4096)).checked()
    if "failed" in says:
        assert "'mine' of broken-one" in str(error.value)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("return 'lm_head'", "not a list of module names"),
        ("return ['model.nowhere']", "'model.nowhere', which is no module"),
        ("return model.nothing.weight", "failed: AttributeError"),
    ],
)
def test_a_module_kind_that_fails_when_used_names_its_package(install, body, says):
    code = f"""
    def select(model):
        {body}

    @hookimpl
    def longlora_trainable_modules():
        return {{"mine": select}}
    """
    install("broken-one", code)
    select = registry.find("longlora_trainable_modules", "mine")
    with pytest.raises(ValueError, match=says) as error:
        select(tiny.llama())
    assert "'mine' of broken-one" in str(error.value)


def test_a_pattern_that_fails_when_used_names_its_package(install):
    code = """
    from longlora_plugin.attention import AttentionPattern

    @hookimpl
    def longlora_attention_patterns():
        return {"mine": AttentionPattern("mine", lambda heads, group_size: heads / 0)}
    """
    install("broken-one", code)
    pattern = registry.find("longlora_attention_patterns", "mine")
    with pytest.raises(ValueError, match="'mine' of broken-one failed: ZeroDivisionError"):
        pattern.shifts(4, 8)


def test_a_class_instance_can_be_the_entry_point(install):
    code = """
    class Package:
        @hookimpl
        def longlora_rope_presets(self):
            return {"mine": lambda request: {"rope_type": "linear", "factor": 3}}

    package = Package()
    """
    install("good", code, "good:package")
    assert "mine" in registry.provided("longlora_rope_presets")
    assert registry.survey("longlora_rope_presets")[0]["mine"].owner == "good"


# ---- every hook is specified, built in, shown, documented and tested -------------------------


def test_there_are_the_four_hooks_of_the_design():
    assert HOOKS == [
        "longlora_rope_presets",
        "longlora_attention_patterns",
        "longlora_trainable_modules",
        "longlora_recipes",
    ]


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_is_built_in_shown_by_the_example_documented_and_tested(hook):
    specification = getattr(hookspecs, hook)
    assert len(inspect.getdoc(specification) or "") > 100
    assert hook in registry.CHECKS
    assert hasattr(importlib.import_module(registry.BUILTINS[hook]), hook)
    assert len(registry.provided(hook)) >= 1
    example = ast.parse((EXAMPLE / "longlora_example" / "__init__.py").read_text())
    assert hook in {node.name for node in example.body if isinstance(node, ast.FunctionDef)}
    page = (ROOT / "docs" / "reference" / "hooks.md").read_text()
    assert f"## {hook}" in page
    assert any(broken == hook for _, broken, _ in BROKEN.values())

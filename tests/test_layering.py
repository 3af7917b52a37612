"""The rules of the design (rooms, habits) hold in the source, read by ast."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from architecture import arrows, cycle, module_imports

from longlora_plugin.args import LongLoRAArgs, LongLoRAConfig

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "longlora_plugin"
MODULES = sorted(PACKAGE.rglob("*.py"))

HOST = {"plugin.py", "host/compat.py", "host/context_parallel.py", "host/schema.py"}
"""The only modules that import Axolotl."""

LIGHT = ["", "args", "registry", "hookspecs", "run", "recipes", "cli", "rope"]
"""Modules that load no torch; "" is the package."""

KERNEL_MODULES = (
    "flash_attn",
    "flash_attn_interface",
    "xformers",
    "torch.nn.attention",
    "torch.backends.cuda",
    "transformers.integrations.flash_attention",
    "transformers.integrations.flex_attention",
    "transformers.integrations.sdpa_attention",
    "transformers.modeling_flash_attention_utils",
)
KERNEL_NAMES = {"scaled_dot_product_attention", "flex_attention", "flash_attn_varlen_func"}


ALLOWED = {
    "adapter": "attention checkpoints hookspecs",
    "args": "",
    "artifacts": "adapter checkpoints",
    "attention": "hookspecs",
    "checkpoints": "rope",
    "cli": "artifacts checkpoints doctor evaluation longqa merge plan recipes run",
    "doctor": "artifacts attention recipes run",
    "evaluation": "artifacts checkpoints rope run",
    "hookspecs": "",
    "host": "",
    "longlora_plugin": "",
    "longqa": "",
    "merge": "adapter artifacts checkpoints rope",
    "plan": "args attention checkpoints registry run",
    "plugin": "adapter args artifacts attention evaluation host merge rope run",
    "recipes": "args artifacts evaluation hookspecs host plan registry run",
    "registry": "attention hookspecs",
    "rope": "hookspecs registry",
    "run": "adapter args artifacts attention checkpoints registry rope",
}
"""Part of the package → the parts that it imports, all of them."""

READS_RECIPES = ("run/", "recipes/", "cli/", "host/", "plugin.py", "plan/from_recipe.py")
"""Where raw recipes, the mapping that YAML gives, are read."""

FILE_LINES, FUNCTION_LINES = 400, 60


def relative(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports_of(tree: ast.Module) -> Iterator[str]:
    """Dotted names of everything a module imports, at its top or anywhere inside."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and _called(node) in ("import_module", "__import__"):
            yield from (
                argument.value
                for argument in node.args
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str)
            )


def _called(node: ast.Call) -> str:
    function = node.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def test_there_is_something_to_check():
    assert len(MODULES) > 40
    assert "axolotl.integrations.base.BasePlugin" in set(
        imports_of(tree_of(PACKAGE / "host/compat.py"))
    )


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_only_the_plugin_and_its_host_module_import_axolotl(path):
    found = [name for name in imports_of(tree_of(path)) if name.split(".")[0] == "axolotl"]
    assert not found or relative(path) in HOST, found


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_only_the_attention_room_knows_kernels(path):
    if relative(path).startswith("attention/"):
        return
    tree = tree_of(path)
    found = [name for name in imports_of(tree) if name.startswith(KERNEL_MODULES)]
    found += [
        node.attr if isinstance(node, ast.Attribute) else node.id
        for node in ast.walk(tree)
        if (isinstance(node, ast.Attribute) and node.attr in KERNEL_NAMES)
        or (isinstance(node, ast.Name) and node.id in KERNEL_NAMES)
    ]
    assert not found


def test_the_kernel_rule_would_find_the_kernels_where_they_are_allowed():
    names = {
        name for path in (PACKAGE / "attention").glob("*.py") for name in imports_of(tree_of(path))
    }
    assert any(name.startswith(KERNEL_MODULES) for name in names)


CORE = ("attention/", "rope/", "evaluation/", "plan/flops", "plan/memory", "adapter/", "merge/")


@pytest.mark.parametrize(
    "path", [path for path in MODULES if relative(path).startswith(CORE)], ids=relative
)
def test_core_functions_take_plain_values_never_cfg(path):
    names = {
        argument.arg
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for argument in (*node.args.args, *node.args.kwonlyargs)
    }
    assert "cfg" not in names


def test_no_modules_import_each_other_in_a_circle():
    graph = module_imports()
    assert not cycle(graph)
    assert not cycle(arrows(graph))


def test_a_circle_would_be_found():
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


def test_parts_of_the_package_import_what_is_allowed_and_nothing_else():
    found = {start: " ".join(sorted(ends)) for start, ends in arrows(module_imports()).items()}
    assert found == ALLOWED, "a new arrow needs a reason; one that went is deleted from ALLOWED"


def reads_a_recipe(tree: ast.Module) -> bool:
    """Whether it looks at `.raw`, or a key of something called recipe, raw or cfg."""
    raw = {"recipe", "raw", "cfg"}
    for found in ast.walk(tree):
        if isinstance(found, ast.Attribute) and found.attr == "raw":
            return True
        value = None
        if isinstance(found, ast.Call) and _called(found) == "get" and found.args:
            value, key = getattr(found.func, "value", None), found.args[0]
        elif isinstance(found, ast.Subscript):
            value, key = found.value, found.slice
        if isinstance(value, ast.Name) and value.id in raw and isinstance(key, ast.Constant):
            return True
    return False


def test_raw_recipes_are_read_where_recipes_are_read():
    found = {relative(path) for path in MODULES if reads_a_recipe(tree_of(path))}
    found = {name for name in found if not name.startswith(READS_RECIPES)}
    assert not found, "what is decided in run/ is passed on as plain values"


def oversized() -> Iterator[str]:
    """file or file::function."""
    programs = [path for folder in ("benchmarks", "docs") for path in (ROOT / folder).rglob("*.py")]
    for path in [*MODULES, *programs, *(ROOT / "tests").rglob("*.py")]:
        text = path.read_text(encoding="utf-8")
        name = path.relative_to(ROOT).as_posix()
        if text.count("\n") > FILE_LINES:
            yield name
        for function in ast.walk(tree_of(path)):
            if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if function.end_lineno - function.lineno >= FUNCTION_LINES:
                yield f"{name}::{function.name}"


def test_files_and_functions_are_short():
    assert not set(oversized()), "split it"


@pytest.mark.parametrize("folder", ["longlora_plugin", "tests", "benchmarks", "examples", "docs"])
def test_modules_are_named_by_what_they_hold(folder):
    vague = {"utils", "util", "helpers", "helper", "common", "misc"}
    names = [path for path in (ROOT / folder).rglob("*") if path.suffix in ("", ".py")]
    assert [path for path in names if path.stem in vague and "site-packages" not in str(path)] == []


@pytest.fixture(scope="module")
def loads() -> dict[str, list[str]]:
    """Light module → heavy packages that it loads; all in one process, each counted once."""
    names = [f"longlora_plugin.{module}".rstrip(".") for module in LIGHT]
    code = f"""
import importlib, json, sys
loads, heavy = {{}}, {{"torch", "transformers", "axolotl"}}
for module, name in zip({LIGHT}, {names}):
    before = set(sys.modules)
    importlib.import_module(name)
    loads[module] = sorted(heavy & (set(sys.modules) - before))
print(json.dumps(loads))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_load_no_torch(module, loads):
    assert loads[module] == []


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_import_nothing_heavy_at_their_top(module):
    target = PACKAGE / module if (PACKAGE / module).is_dir() else PACKAGE / f"{module}.py"
    path = target / "__init__.py" if target.is_dir() else target
    heavy = {"torch", "transformers", "peft", "axolotl", "datasets", "matplotlib"}
    top = [node for node in tree_of(path).body if isinstance(node, ast.Import | ast.ImportFrom)]
    found = set(imports_of(ast.Module(body=list(top), type_ignores=[])))
    assert not {name for name in found if name.split(".")[0] in heavy}


@pytest.mark.parametrize("path", sorted((PACKAGE / "cli").glob("*.py")), ids=relative)
def test_commands_import_what_is_heavy_inside(path):
    heavy = {"torch", "transformers", "peft", "axolotl", "datasets", "matplotlib", "numpy"}
    top = [node for node in tree_of(path).body if isinstance(node, ast.Import | ast.ImportFrom)]
    found = set(imports_of(ast.Module(body=list(top), type_ignores=[])))
    assert not {name for name in found if name.split(".")[0] in heavy}


@pytest.mark.parametrize("model", [LongLoRAConfig, LongLoRAArgs])
def test_every_field_of_the_block_is_described(model):
    for name, field in model.model_fields.items():
        assert field.description, name
        assert field.description.endswith("."), name


def test_unknown_keys_are_errors():
    assert LongLoRAConfig.model_config["extra"] == "forbid"


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_every_module_says_what_it_is(path):
    if path.read_text().strip():
        assert ast.get_docstring(tree_of(path))


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_nothing_is_called_lora_plus(path):
    # "LoRA+" is another method today, and loraplus_… are Axolotl's keys for it.
    assert not re.search(r"lora(\+|⁺|[_ -]plus|plus(?!_))", path.read_text(), re.IGNORECASE)


def test_the_oracle_imports_nothing_from_the_package():
    for name in ("reference.py", "support/dense_attention.py"):
        found = set(imports_of(tree_of(ROOT / "tests" / name)))
        assert not {each for each in found if each.startswith("longlora_plugin")}, name


def test_every_command_has_its_module_and_every_module_its_command():
    from longlora_plugin.cli import COMMANDS, MODULES

    modules = {path.stem for path in (PACKAGE / "cli").glob("*.py")}
    modules -= {"__init__", "__main__", "measuring", "options", "output"}
    assert modules == {MODULES.get(name, name) for name in COMMANDS}

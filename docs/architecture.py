"""The import graph of the package, and the page that draws it.

A node is a folder of the package, or a module at its top (`plugin`, `args`, …); an arrow says that
something in the first imports something of the second, at the top of a module or inside a function.
Imports for type checkers only are no arrows, nor are built-ins that the registry names by text.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "longlora_plugin"

Graph = dict[str, set[str]]


def module_imports(package: Path = PACKAGE) -> Graph:
    """Dotted name of each module → those of the package's modules that it imports."""
    modules: dict[str, Path] = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    graph: Graph = {}
    for module, path in modules.items():
        found = set()
        for name in _imported(ast.parse(path.read_text(encoding="utf-8"))):
            while name and name not in modules:
                name = name.rpartition(".")[0]
            found.add(name)
        graph[module] = found - {"", module, package.name}
    return graph


def _imported(node: ast.AST) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        yield from _imported(child)


def arrows(graph: Graph) -> Graph:
    """The same between the nodes of the picture."""
    drawn: Graph = {}
    for module, imported in graph.items():
        start = node(module)
        drawn.setdefault(start, set()).update({node(name) for name in imported} - {start})
    return {start: drawn[start] for start in sorted(drawn)}


def node(module: str) -> str:
    """`longlora_plugin.rope.presets` → `rope`; the package itself is `longlora_plugin`."""
    return module.split(".")[1] if "." in module else module


def cycle(graph: Graph) -> list[str]:
    """Nodes that import each other in a circle, the first again at the end; empty if none do."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for following in sorted(graph.get(name, ())):
            if found := visit(following, [*path, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(graph) if (found := visit(name, []))), [])


def layers(graph: Graph) -> list[list[str]]:
    """Nodes by the longest way of arrows that begins at them, the longest first."""

    def height(name: str) -> int:
        return max((1 + height(end) for end in graph.get(name, ())), default=0)

    by_height: dict[int, list[str]] = {}
    for name in graph:
        by_height.setdefault(height(name), []).append(name)
    return [by_height[each] for each in sorted(by_height, reverse=True)]


def page(text: str) -> str:
    """The architecture page `text` with its picture and table drawn anew."""
    graph = arrows(module_imports())
    del graph[PACKAGE.name]
    rows = [
        f"| `{name}` | {_idea(name)} | {', '.join(f'`{end}`' for end in sorted(ends)) or '–'} |"
        for name, ends in graph.items()
    ]
    drawn = {
        "picture": ["```text", *("   ".join(line) for line in layers(graph)), "```"],
        "table": ["| part | what it is | imports |", "|---|---|---|", *rows],
    }
    for name, content in drawn.items():
        before, start, rest = text.partition(f"<!-- {name}: python docs/generate.py -->\n")
        end = f"<!-- end of {name} -->"
        text = before + start + "\n" + "\n".join(content) + "\n\n" + end + rest.partition(end)[2]
    return text


def _idea(name: str) -> str:
    """The first sentence of its docstring."""
    folder = PACKAGE / name
    path = folder / "__init__.py" if folder.is_dir() else PACKAGE / f"{name}.py"
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    first = " ".join(text.split("\n\n")[0].split())
    return first.partition(". ")[0].rstrip(".").replace("|", "\\|")

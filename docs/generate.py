"""Writes the pages and the picture that come from the code: `python docs/generate.py`.

A test compares what is committed with what this would write.
"""

from __future__ import annotations

import importlib
import inspect
import json
import sys
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import architecture
import click
import engines_table
import gpu_shares
import json_tables
import ruler_table
import s2_picture
import works_with
import yaml

DOCS = Path(__file__).resolve().parent
WIDTH = 76
"""Columns of a code block that fit on a page of the site."""
GENERATED = "<!-- Written by docs/generate.py from the code; do not edit. -->\n\n"


# ---- keys of the block ----------------------------------------------------------------------


def yaml_page() -> str:
    from longlora_plugin.args import LongLoRAConfig

    rows = [
        "| key | type | default | meaning |",
        "|---|---|---|---|",
    ]
    for name, field in LongLoRAConfig.model_fields.items():
        default = field.get_default(call_default_factory=True)
        shown = json.dumps(default, ensure_ascii=False).replace('"', "")
        rows.append(
            f"| `{name}` | {_type(field.annotation)} | `{shown}` | {_cell(field.description)} |"
        )
    return (
        "# Keys of the `longlora:` block\n\n"
        + GENERATED
        + """Every key is optional, and an unknown one is an error that names the nearest valid key.
The block works with `adapter: longlora`, `lora`, `qlora`, or none (full fine-tuning).

<div class="stacked" markdown>

"""
        + "\n".join(rows)
        + """

</div>

`group_size` and `group_size_ratio` answer the same question: give one, or none. The group follows
`sequence_len`, not the row at hand.

## For editors

`longlora recipes schema --output longlora.schema.json` writes a JSON Schema of
Axolotl's keys and the block, with the names of the presets, patterns and module kinds that are
installed. Editors that use yaml-language-server complete and check a recipe whose first line is

```yaml
# yaml-language-server: $schema=longlora.schema.json
```

## Keys of Axolotl that matter here

| key | with LongLoRA |
|---|---|
| `adapter: longlora` | LoRA with trainable embeddings and norms; 4-bit and 8-bit bases as usual |
| `sequence_len` | the context to extend to |
| `lora_r`, `lora_alpha`, `lora_dropout`, `lora_target_*` | yours; where unset, the paper's """
        + _lora_defaults()
        + """ |
| `attn_implementation` | `flash_attention_2` (`_3`, `_4`), `sdpa`, `flex_attention`, `eager` |
| `sample_packing` | supported: documents never mix |
| `model_config` | merged with what RoPE needs; RoPE keys of your own there need `rope: none` |

FlexAttention shares grouped K and V where the number of query heads is a power of two; for others
transformers repeats K and V for each query head, which takes their memory many times.
"""
    )


def _lora_defaults() -> str:
    from longlora_plugin.run.axolotl_keys import LORA_DEFAULTS, LORA_TARGETS

    numbers = ", ".join(
        f"{key.removeprefix('lora_')} {value:g}" for key, value in LORA_DEFAULTS.items()
    )
    return f"({numbers}; {', '.join(LORA_TARGETS)})"


def _type(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return " or ".join(f"`{value}`" for value in get_args(annotation))
    text = str(annotation) if not inspect.isclass(annotation) else annotation.__name__
    for long, short in (
        ("typing.", ""),
        (" | None", ""),
        ("dict[str, Any]", "mapping"),
        ("list[str]", "list of names"),
        ("bool", "true or false"),
        ("str", "name"),
        ("int", "whole number"),
        ("float", "number"),
        (" | ", " or "),
    ):
        text = text.replace(long, short)
    return text


def _cell(text: str | None) -> str:
    return (text or "").replace("|", "\\|")


# ---- RoPE presets ---------------------------------------------------------------------------

LLAMA_2 = {"model_type": "llama", "max_position_embeddings": 4096, "hidden_size": 4096}
SHOWN_OPTIONS: dict[str, dict[str, Any]] = {"theta": {"theta": 1_000_000}}


def presets_page() -> str:
    from longlora_plugin.rope import PRESETS

    parts = [
        "# RoPE presets\n",
        GENERATED.strip(),
        """
`longlora.rope` takes a preset's name, or a mapping with its options:

```yaml
longlora:
  rope: yarn
  # or
  rope: {preset: yarn, factor: 8}
```

`auto` is the default: the log and `longlora recipes check` say what it chose and why. Every
preset but `none` also takes `replace: true`, which drops the base model's own scaling and
starts from its original context. A base that supports `sequence_len` already is left alone. What a
preset writes is in the config before the model is built, in the run's `config.json`, and in the
merged model's. Each example extends Llama-2-7B from 4096 to 32768 tokens.
""",
    ]
    aliases: dict[Any, list[str]] = {}
    for name, function in PRESETS.items():
        aliases.setdefault(function, []).append(name)
    for function, names in aliases.items():
        also = f" (alias {', '.join(f'`{name}`' for name in names[1:])})" if names[1:] else ""
        parts.append(f"## `{names[0]}`{also}\n\n{inspect.getdoc(function)}\n")
        parts.append(f"Options: {_options(names[0])}\n")
        parts.append(_example(names[0]))
    return "\n".join(parts).rstrip() + "\n"


def _options(preset: str) -> str:
    """Taken from the error that a wrong option gives."""
    from longlora_plugin.rope import resolve_rope

    try:
        resolve_rope(preset, LLAMA_2, 32768, no_such_option=1)
    except ValueError as error:
        options = str(error).split("Options: ")[1].split(", ")
        if options == ["none at all"]:
            return "none."
        return ", ".join(f"`{option}`" for option in options) + "."
    raise AssertionError(f"{preset} takes any option")


def _example(preset: str) -> str:
    from longlora_plugin.rope import resolve_rope

    options = SHOWN_OPTIONS.get(preset, {})
    try:
        settings = resolve_rope(preset, LLAMA_2, 32768, **options)
    except ValueError as error:
        return f"Without its options: *{str(error).removeprefix('rope: ')}*\n"
    asked = yaml.safe_dump(
        {"rope": {"preset": preset, **options} if options else preset},
        default_flow_style=bool(options),
    ).strip()
    written = yaml.safe_dump(
        {
            "rope_parameters": settings.rope_parameters,
            "max_position_embeddings": settings.max_position_embeddings,
        },
        sort_keys=True,
    )
    asked = asked.removeprefix("{").removesuffix("}") if options else asked
    return f"```yaml\n# {asked}\n{written}```\n"


# ---- hooks ----------------------------------------------------------------------------------


def hooks_page() -> str:
    from longlora_plugin import hookspecs, registry

    example = (DOCS.parent / "examples/plugin-package/longlora_example/__init__.py").read_text()
    parts = [
        "# Hooks\n",
        GENERATED.strip(),
        """
A package adds to LongLoRA by declaring an entry point in group `longlora`; installing it is all
that a user does ([how to write one](../howto/plugin-package.md)). Each hook returns a mapping from
a name, as recipes write it, to what it names. What this package itself provides comes
through the same hooks.

A package that does not load, raises, returns something of the wrong kind, or takes a name that
exists is named in a warning and skipped. A run fails only if its recipe asks for a name that
nobody provides; the error then says which skipped package may have it.
""",
    ]
    for hook in registry.hook_names():
        parts.append(f"## {hook}\n\n{inspect.getdoc(getattr(hookspecs, hook))}\n")
        builtin = [
            f"`{name}`"
            for name, offer in registry.survey(hook)[0].items()
            if offer.owner == registry.BUILTIN
        ]
        parts.append(f"Built in: {', '.join(builtin)}.\n")
        parts.append(f"```python\n{_source_of(example, hook)}\n```\n")
    return "\n".join(parts).rstrip() + "\n"


def _source_of(module: str, hook: str) -> str:
    """The part of the example that shows a hook: the hook and the function after it, if any."""
    import ast

    tree = ast.parse(module)
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    lines = module.splitlines()
    place = next(i for i, node in enumerate(functions) if node.name == hook)
    shown = [functions[place]]
    if place + 1 < len(functions) and not functions[place + 1].decorator_list:
        shown.append(functions[place + 1])
    first = min(decorator.lineno for decorator in shown[0].decorator_list)
    return "\n".join(lines[first - 1 : shown[-1].end_lineno])


# ---- commands -------------------------------------------------------------------------------


def commands_page() -> str:
    from longlora_plugin.cli import COMMANDS, longlora

    parts = [
        "# Commands\n",
        GENERATED.strip(),
        "\nThe command is `longlora`; `axolotl longlora` is the same, starts more slowly "
        "and puts Axolotl's banner into pipes. "
        "Wrong values are one clear error; exit status 2 is "
        "wrong usage.\n",
    ]
    root = click.Context(longlora, info_name="longlora")
    for name in sorted(COMMANDS):
        command = longlora.get_command(root, name)
        assert command is not None
        parts += _command(command, root, name, level=2)
    return "\n".join(filter(None, parts)).rstrip() + "\n"


def _command(command: click.Command, parent: click.Context, name: str, level: int) -> list[str]:
    context = click.Context(command, info_name=name, parent=parent, max_content_width=WIDTH)
    context.terminal_width = WIDTH
    title = context.command_path.removeprefix("longlora ")
    help_text = "\n".join(line.rstrip() for line in command.get_help(context).splitlines())
    parts = [f"{'#' * level} {title}\n", f"```text\n{help_text}\n```\n", json_tables.table(title)]
    if isinstance(command, click.Group):
        for child in command.list_commands(context):
            found = command.get_command(context, child)
            assert found is not None
            parts += _command(found, context, child, level + 1)
    return parts


# ---- recipes --------------------------------------------------------------------------------


def recipes_page() -> str:
    from longlora_plugin.recipes import Listed, longlora_recipes

    rows = ["| name | base model | `sequence_len` | what |", "|---|---|---|---|"]
    for name, path in longlora_recipes().items():
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        summary = Listed(path, "longlora-plugin").summary
        rows.append(
            f"| `{name}` | {raw['base_model']} | {raw['sequence_len']} | {_cell(summary)} |"
        )
    return (
        "# Shipped recipes\n\n"
        + GENERATED
        + "\n".join(rows)
        + """

```bash
longlora recipes init qlora-24gb --set sequence_len=32768
longlora recipes check qlora-24gb.yml --gpu rtx4090-24gb
```

[How to check a recipe](../howto/recipes.md)
"""
    )


# ---- public functions -----------------------------------------------------------------------


def api_page() -> str:
    """What `__all__` names; mkdocstrings writes the entries from the docstrings."""
    parts = [
        "# API for Python\n",
        GENERATED.strip(),
        """
What a program can import. Everything else may change without notice. Only `LongLoRAPlugin` imports
Axolotl.
""",
    ]
    for title, name in (
        ("The package", "longlora_plugin"),
        ("Attention", "longlora_plugin.attention"),
        ("RoPE", "longlora_plugin.rope"),
        ("Evaluation", "longlora_plugin.evaluation"),
    ):
        parts.append(f"## {title}\n")
        parts += [f"::: {name}.{each}\n" for each in importlib.import_module(name).__all__]
    return "\n".join(parts).rstrip() + "\n"


# ---- architecture ---------------------------------------------------------------------------


def architecture_page() -> str:
    return architecture.page((DOCS / "explanation/architecture.md").read_text(encoding="utf-8"))


def gpu_page() -> str:
    if str(DOCS.parent) not in sys.path:
        sys.path.insert(0, str(DOCS.parent))
    from benchmarks.gpu.page import RESULTS, page
    from longlora_plugin.plan.cost import MEASURED

    shares = gpu_shares.shares_of(json.loads(RESULTS.read_text(encoding="utf-8")))
    MEASURED.write_text(json.dumps(shares, indent=1) + "\n", encoding="utf-8")
    source = "<!-- Written by docs/generate.py from benchmarks/gpu/results.json; do not edit. -->"
    return f"# On a GPU\n\n{source}\n\n{page()}"


PAGES = {
    "reference/yaml.md": yaml_page,
    "reference/rope-presets.md": presets_page,
    "reference/hooks.md": hooks_page,
    "reference/commands.md": commands_page,
    "reference/recipes.md": recipes_page,
    "reference/works-with.md": works_with.page,
    "reference/api.md": api_page,
    "reference/gpu.md": gpu_page,
    "reference/engines.md": engines_table.page,
    "reference/ruler.md": ruler_table.page,
    "explanation/architecture.md": architecture_page,
}


def main() -> None:
    for name, page in PAGES.items():
        (DOCS / name).write_text(page(), encoding="utf-8")
    s2_picture.draw(s2_picture.PICTURE)


if __name__ == "__main__":
    main()

"""Axolotl's own schema: what it refuses, warns of and ignores in a recipe."""

from __future__ import annotations

import copy
import difflib
import importlib
import logging
import pkgutil
import runpy
import sys
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

OPTIONS = Path("cli", "config_options.py")
"""Axolotl's generated list of command-line options, one for each key of a recipe."""
NOT_OPTIONS = {
    "capabilities",
    "env_capabilities",
    "model_config",
    "overrides_of_model_config",
    "model_kwargs",
    "model_revision",
    "revision_of_model",
    "model_type",
    "type_of_model",
}
"""Keys that Axolotl has no option for."""


@dataclass
class SchemaReport:
    """What Axolotl's own validation says of a recipe.

    Attributes:
        config: the validated recipe; None where there are problems.
        problems: what Axolotl refuses.
        warnings: what it warns of.
        unknown: key → keys like it, for every key that nobody reads; Axolotl drops those in
            silence. Of the plugins in `plugins_missing` the keys are not known.
        plugins_missing: plugins of the recipe that need a package which is not installed here.
    """

    config: dict[str, Any] | None = None
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    unknown: dict[str, list[str]] = field(default_factory=dict)
    plugins_missing: list[str] = field(default_factory=list)


def check_schema(recipe: Mapping[str, Any], capabilities: Mapping[str, Any]) -> SchemaReport:
    """Validate a lowered recipe as `axolotl train` would on a GPU of the given capabilities.

    Fields that are wrong are all told at once; of cross-checks, Axolotl stops at the first.

    Args:
        recipe: as our `register` leaves it.
        capabilities: `bf16`, `fp8`, `tf32`, `n_gpu`, `compute_capability` (`sm_80`).
    """
    import torch
    from axolotl.integrations.base import PluginManager
    from axolotl.integrations.config import merge_input_args
    from axolotl.utils import config as validation
    from axolotl.utils.dict import DictDefault

    report = SchemaReport()
    manager = PluginManager.get_instance()
    before = dict(manager.plugins)
    environment = {"torch_version": str(torch.__version__).split("+", maxsplit=1)[0]}
    cfg = DictDefault(copy.deepcopy(dict(recipe)))
    shares_rows = cfg.get("context_parallel_size") or cfg.get("sequence_parallel_degree")
    installed = _as_if_installed("ring_flash_attn") if shares_rows else nullcontext()
    with _warnings_into(report.warnings), installed:
        try:
            manager.plugins.clear()
            _load_plugins(manager, cfg, report)
            schema = merge_input_args()[0]
            report.unknown = _unknown_keys(schema, cfg)
            try:
                valid = validation.validate_config(
                    copy.deepcopy(cfg),
                    capabilities=dict(capabilities),
                    env_capabilities=environment,
                )
                report.config = dict(valid)
            except Exception:
                manager.on_config_validation_error(cfg)
                data = {
                    **cfg.to_dict(),
                    "capabilities": dict(capabilities),
                    "env_capabilities": environment,
                }
                found = list(_dataset_problems(cfg))
                rows = cfg.get("datasets")
                if not isinstance(rows, list) or all(isinstance(row, Mapping) for row in rows):
                    found += _refusals(schema, data)  # it crashes on a row that is no block
                report.problems += found or ["Axolotl refuses this recipe"]
        finally:
            manager.plugins.clear()
            manager.plugins.update(before)
    return report


@contextmanager
def _as_if_installed(package: str) -> Iterator[None]:
    """Axolotl 0.19 imports ring-flash-attn to validate a recipe, also of one for another machine;
    whether it is there, `doctor` says.
    """
    with suppress(ImportError):  # or flash-attn, which it imports
        importlib.import_module(package)
    stand_in = types.ModuleType(package)
    sys.modules.setdefault(package, stand_in)
    try:
        yield
    finally:
        if sys.modules[package] is stand_in:
            del sys.modules[package]


def _load_plugins(manager: Any, cfg: Any, report: SchemaReport) -> None:
    from axolotl.integrations.base import load_plugin

    names = cfg.get("plugins")
    for name in dict.fromkeys(map(str, names if isinstance(names, list) else [])):
        try:
            plugin = load_plugin(name)
        except ModuleNotFoundError as error:
            parts = name.replace(":", ".").split(".")
            own = str(error.name or "").removeprefix("axolotl.integrations.")
            if own and own.split(".")[0] in (parts[0], "axolotl"):
                report.problems.append(f"plugins: there is no {name} ({error})")
            else:
                report.plugins_missing.append(f"{name} ({error})")
            continue
        except (AttributeError, ValueError, ImportError) as error:
            report.problems.append(f"plugins: {name} does not load: {error}")
            continue
        manager.plugins[name] = plugin
        if type(plugin).__module__.split(".")[0] == "longlora_plugin":
            continue  # the recipe is lowered already
        try:
            plugin.register(cfg)
        except Exception as error:
            report.problems.append(f"plugins: {name} refuses this recipe: {error}")


def _keys_of(schema: Any) -> set[str]:
    return {key for name, each in schema.model_fields.items() for key in _names_of(name, each)}


def _names_of(name: str, field_info: Any) -> list[str]:
    """Every key that sets a field."""
    choices = getattr(field_info.validation_alias, "choices", None) or [field_info.validation_alias]
    return [str(key) for key in (name, field_info.alias, *choices) if key]


def _refusals(schema: Any, data: Mapping[str, Any]) -> Iterator[str]:
    """What Axolotl's schema refuses: every wrong field, or the first cross-check that fails."""
    from axolotl.utils import config as validation
    from pydantic import ValidationError

    validate = getattr(
        validation, "_model_with_inherited_default_fallback", lambda model, values: model(**values)
    )
    try:
        validate(schema, copy.deepcopy(dict(data)))
    except ValidationError as error:
        yield from _explanations(error.errors())
    except Exception as error:
        yield str(error)


def _dataset_class(recipe: Mapping[str, Any], row: Mapping[str, Any]) -> Any:
    """The class as which Axolotl reads a row of `datasets`."""
    from axolotl.utils.schemas import datasets

    if recipe.get("rl") in ("dpo", "ipo", "simpo"):
        return datasets.DPODataset
    if recipe.get("rl") == "kto":
        return datasets.KTODataset
    return datasets.SyntheticDataset if row.get("type") == "_synthetic" else datasets.SFTDataset


def _dataset_problems(recipe: Mapping[str, Any]) -> Iterator[str]:
    from pydantic import ValidationError

    rows = recipe.get("datasets")
    for index, row in enumerate(rows if isinstance(rows, list) else []):
        if not isinstance(row, Mapping):
            yield f"datasets.{index}: got {row!r}; write a block of keys such as path and type"
            continue
        try:
            _dataset_class(recipe, row)(**dict(row))
        except ValidationError as error:
            for text in _explanations(error.errors()):
                yield f"datasets.{index}.{text}"


def _unknown_keys(schema: Any, recipe: Mapping[str, Any]) -> dict[str, list[str]]:
    places = [("", recipe, schema)]
    for section in ("datasets", "test_datasets"):
        rows = recipe.get(section)
        for index, row in enumerate(rows if isinstance(rows, list) else []):
            if isinstance(row, Mapping):
                places.append((f"{section}.{index}.", row, _dataset_class(recipe, row)))
    unknown = {}
    for where, given, model in places:
        known = _keys_of(model)
        if model.model_config.get("extra") == "allow":
            continue
        for key, value in given.items():
            if key not in known and value is not None:
                near = difflib.get_close_matches(str(key), known, n=3, cutoff=0.7)
                unknown[f"{where}{key}"] = near
    return unknown


def _explanations(details: list[Any]) -> Iterator[str]:
    for each in details:
        where = [str(part) for part in each["loc"]]
        if where[0:1] == ["datasets"] and len(where) > 1:
            continue  # a union of classes here; `_dataset_problems` asks the one that counts
        message = each["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
        key = ".".join(where)
        if not key:
            yield message
        elif each["type"] in ("missing", "value_error"):
            yield f"{key}: {message}"
        else:
            yield f"{key}: got {each['input']!r}; {message[0].lower()}{message[1:]}"


@contextmanager
def _warnings_into(messages: list[str]) -> Iterator[None]:
    """Collect what Axolotl logs as a warning instead of printing it."""

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = record.getMessage()
            if text not in messages:
                messages.append(text)

    logger = logging.getLogger("axolotl")
    collect = Collect(logging.WARNING)
    kept = (logger.handlers[:], logger.propagate, logger.level)
    logger.handlers[:], logger.propagate = [collect], False
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.handlers[:], logger.propagate = kept[0], kept[1]
        logger.setLevel(kept[2])


def input_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of Axolotl's keys and of those of the plugins it ships."""
    from axolotl.utils.schemas.config import AxolotlInputConfig
    from pydantic.json_schema import GenerateJsonSchema, models_json_schema

    class Generator(GenerateJsonSchema):
        def emit_warning(self, kind: str, detail: str) -> None:
            """Say nothing: a default that JSON cannot write is left out."""

        def enum_schema(self, schema: Any) -> dict[str, Any]:
            # Some members are torch dtypes, which Axolotl reads from text.
            plain = all(isinstance(member.value, str | int) for member in schema["members"])
            return super().enum_schema(schema) if plain else {}

        def handle_invalid_for_json_schema(self, schema: Any, error_info: str) -> dict[str, Any]:
            return {}

    models = [AxolotlInputConfig, *_plugin_arguments()]
    by_model, whole = models_json_schema(
        [(model, "validation") for model in models], schema_generator=Generator
    )
    properties: dict[str, Any] = {}
    for model in models:
        reference = by_model[model, "validation"]["$ref"].rsplit("/", 1)[-1]
        own = whole["$defs"].pop(reference)["properties"]
        properties = own | properties
        for name, info in model.model_fields.items():
            # An alias is the name in the schema; Axolotl reads the field's own name as well.
            names = _names_of(name, info)
            written = next((own[key] for key in names if key in own), None)
            properties |= {key: written for key in names if written is not None}
    return {"type": "object", "properties": properties, "$defs": whole["$defs"]}


def _plugin_arguments() -> Iterator[Any]:
    from axolotl import integrations
    from pydantic import BaseModel

    for found in pkgutil.iter_modules(integrations.__path__, f"{integrations.__name__}."):
        name = f"{found.name}.args"
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue  # it has no keys, or needs a package that is not installed here
        for each in vars(module).values():
            ours = isinstance(each, type) and each.__module__ == name
            if ours and issubclass(each, BaseModel) and each.__name__.endswith("Args"):
                yield each


def known_keys() -> frozenset[str]:
    """Keys of the installed Axolotl without its plugins', read without importing it (which takes
    seconds); none where it has no list of them.
    """
    axolotl = find_spec("axolotl")
    folders = axolotl.submodule_search_locations if axolotl else None
    found = (Path(folder, OPTIONS) for folder in folders or ())
    path = next((each for each in found if each.is_file()), None)
    if path is None:
        return frozenset()
    options = runpy.run_path(str(path)).get("AXOLOTL_CONFIG_CLI_OPTIONS", ())
    flags = (name.split("/")[0] for names, *_ in options for name in names)
    keys = {flag.lstrip("-").split(".")[0].replace("-", "_") for flag in flags}
    return frozenset(keys | NOT_OPTIONS) if keys else frozenset()

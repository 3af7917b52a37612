"""Load an adapter or a merged model with the RoPE it was trained with.

PEFT and transformers take an adapter's RoPE from the base model, so that
`AutoPeftModelForCausalLM`, `PeftModel.from_pretrained` on the plain base model and
`AutoModelForCausalLM` on an adapter's hub name lose the extended context without an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longlora_plugin.artifacts.manifest import FILE, check_files, read_manifest
from longlora_plugin.checkpoints.files import ADAPTER_CONFIG, read_json
from longlora_plugin.checkpoints.run_config import for_base_weights, trained_config

HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "subfolder")
AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
}
"""PEFT's task type → the class that loads its base model."""


def load_model(path_or_name: str | Path, **kwargs: Any) -> Any:
    """Load an adapter with its base model, or a merged or fully fine-tuned model.

    Args:
        path_or_name: a local folder or a name on the Hugging Face hub.
        kwargs: options of transformers' `from_pretrained` (`dtype`, `device_map`,
            `quantization_config`, `attn_implementation`, `revision`, …). `revision` is that of
            `path_or_name`; the base model's is what the adapter says.

    Returns:
        A `PeftModel` for an adapter, a transformers model otherwise, in evaluation mode.

    Raises:
        ValueError: the folder holds neither, or an adapter does not say how RoPE was scaled.
    """
    hub = {key: kwargs.pop(key) for key in HUB_OPTIONS if key in kwargs}
    if isinstance(path_or_name, Path) or str(path_or_name).startswith((".", "/", "~")):
        path_or_name = str(Path(path_or_name).expanduser())
        if not Path(path_or_name).is_dir():
            raise ValueError(f"there is no folder {path_or_name}; give a folder or a hub name")
    if _file(path_or_name, ADAPTER_CONFIG, hub):
        return _load_adapter(path_or_name, hub, kwargs)
    if not _file(path_or_name, "config.json", hub):
        raise ValueError(
            f"{path_or_name} holds neither adapter_config.json nor config.json; give the folder "
            "that training or merging wrote"
        )
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(path_or_name, **hub, **kwargs).eval()


def _load_adapter(name: str | Path, hub: dict[str, Any], options: dict[str, Any]) -> Any:
    import transformers

    adapter = read_json(Path(str(_file(name, ADAPTER_CONFIG, hub))))
    base = adapter.get("base_model_name_or_path")
    if not base:
        raise ValueError(
            f"{name}: its adapter_config.json names no base_model_name_or_path; write the base "
            "model's folder or name there"
        )
    task = adapter.get("task_type") or "CAUSAL_LM"
    if task not in AUTO_CLASSES:
        raise ValueError(
            f"{name}: task_type {task} is not supported; supported: {', '.join(AUTO_CLASSES)}"
        )
    at_base: dict[str, Any] = {
        key: hub[key] for key in ("token", "cache_dir", "local_files_only") if key in hub
    }
    if adapter.get("revision"):
        at_base["revision"] = adapter["revision"]
    model = getattr(transformers, AUTO_CLASSES[task]).from_pretrained(
        base, config=_config(name, base, hub, at_base), **at_base, **options
    )
    return put_on(model, name, **hub)


def _config(name: str | Path, base: str, hub: dict[str, Any], at_base: dict[str, Any]) -> Any:
    """The config that the adapter was trained with, as its base model's weights can be loaded."""
    from transformers import AutoConfig

    saved = _file(name, "config.json", hub) or _file(name, FILE, hub)
    if saved is None:
        raise ValueError(
            f"{name} has neither {FILE} nor config.json, so how RoPE was scaled is not known; copy "
            "config.json from the run's output_dir into it"
        )
    _file(name, FILE, hub)  # into the same folder, from a hub
    return config_of_adapter(AutoConfig.from_pretrained(base, **at_base), Path(saved).parent)[0]


def config_of_adapter(
    base_config: Any, folder: Path, recipe: Mapping[str, Any] | None = None
) -> tuple[Any, list[str]]:
    """The config that an adapter was trained with, as its base model's weights can be loaded.

    Args:
        folder: of the adapter.
        recipe: fields of the config that the recipe sets by now; None where there is no recipe.

    Returns:
        The config, and a line for each field in which the recipe disagrees with the run.

    Raises:
        ValueError: what the run saved cannot be read, is of another kind of model, or of another
            run.
    """
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    trained, notes = trained_config(base_config, folder, recipe or {})
    config = for_base_weights(trained, base_config)
    for field, value in (manifest.config_fields if manifest else {}).items():
        setattr(config.get_text_config(), field, value)
    return config, [] if recipe is None else notes


def put_on(model: Any, adapter: str | Path, **hub: Any) -> Any:
    """A `PeftModel` of a base model and a saved adapter, in evaluation mode."""
    from peft import PeftModel

    from longlora_plugin.adapter.state import match_rows, read_adapter_state

    match_rows(model, read_adapter_state(adapter, **hub))
    return PeftModel.from_pretrained(model, str(adapter), **hub).eval()


def _file(name: str | Path, file: str, hub: dict[str, Any]) -> str | None:
    """Path of a file of a folder or of a hub repository; None where it has none."""
    from transformers.utils import cached_file

    return cached_file(
        str(name),
        file,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **hub,
    )

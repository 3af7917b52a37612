"""Load an adapter or a merged model with the RoPE it was trained with.

PEFT and transformers take an adapter's RoPE from the base model, so that
`AutoPeftModelForCausalLM`, `PeftModel.from_pretrained` on the plain base model and
`AutoModelForCausalLM` on an adapter's hub name lose the extended context without an error.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from longlora_plugin.artifacts.manifest import FILE, Manifest, read_manifest

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
    if _file(path_or_name, "adapter_config.json", hub):
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
    from peft import PeftModel

    adapter = json.loads(Path(str(_file(name, "adapter_config.json", hub))).read_text())
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
    match_vocabulary(model, _rows(name, hub))
    return PeftModel.from_pretrained(model, str(name), **hub).eval()


def _config(name: str | Path, base: str, hub: dict[str, Any], at_base: dict[str, Any]) -> Any:
    """The config that the adapter was trained with, as its base model's weights can be loaded."""
    from transformers import AutoConfig

    original = AutoConfig.from_pretrained(base, **at_base)
    manifest = _manifest(name, hub)
    config = original
    if _file(name, "config.json", hub):
        config = AutoConfig.from_pretrained(str(name), **hub)
        if hasattr(config, "quantization_config") and not hasattr(original, "quantization_config"):
            # How training loaded the base model (QLoRA); its own weights are not stored so.
            del config.quantization_config
        # The rows of added tokens are the adapter's: they are appended after loading.
        config.get_text_config().vocab_size = original.get_text_config().vocab_size
    elif manifest is None:
        raise ValueError(
            f"{name} has neither {FILE} nor config.json, so how RoPE was scaled is not known; copy "
            "config.json from the run's output_dir into it"
        )
    # A later run into the same folder may have replaced config.json before its first save.
    for field, value in (manifest.config_fields if manifest else {}).items():
        setattr(config.get_text_config(), field, value)
    return config


def match_vocabulary(model: Any, rows: int | None) -> None:
    """Give a base model as many embedding rows as an adapter's trained copy has.

    Training with new tokens enlarges the embedding, and PEFT then refuses the base model.

    Args:
        rows: of the trained copy; None where the adapter has none.
    """
    if rows is not None and rows != model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(rows, mean_resizing=False)


def embedding_rows(weights: Path) -> int | None:
    """Rows of the trained input embedding in an adapter's safetensors file; None without one."""
    from safetensors import safe_open

    with safe_open(str(weights), framework="numpy") as tensors:
        for name in tensors.keys():  # noqa: SIM118  (safe_open is not a mapping)
            if name.endswith(("embed_tokens.weight", "wte.weight", "embed_in.weight")):
                return int(tensors.get_slice(name).get_shape()[0])
    return None


def _rows(name: str | Path, hub: dict[str, Any]) -> int | None:
    weights = _file(name, "adapter_model.safetensors", hub)
    return embedding_rows(Path(weights)) if weights else None


def _manifest(name: str | Path, hub: dict[str, Any]) -> Manifest | None:
    file = _file(name, FILE, hub)
    return read_manifest(Path(file).parent) if file else None


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

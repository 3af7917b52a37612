"""`longlora.json`: what an adapter or a model was trained with, in the folder that holds it.

An adapter's own files do not say how RoPE was scaled, and a recipe may change after training. This
file ties the weights to their RoPE, so that loading, merging and resuming can refuse another one.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from longlora_plugin.checkpoints.files import read_json, write_json

FILE = "longlora.json"
FORMAT = 1
PACKAGES = ("longlora-plugin", "axolotl", "transformers", "peft", "torch")
SECRET = re.compile(r"(^|_)(token|api_key|password|secret)$", re.IGNORECASE)
"""Recipe keys that are left out of the file."""
TIED_FILES = ("adapter_config.json", "config.json", "tokenizer.json")
"""What decides an adapter in addition to its weights. Axolotl replaces all three when a run begins,
the weights when it ends."""
CHANGES_IN_USE = {
    *("inference_mode", "use_cache", "truncation", "padding"),
    *("transformers_version", "peft_version", "_name_or_path", "dtype", "torch_dtype"),
    *("base_model_name_or_path", "revision"),  # the same model at another place
}
"""Fields of these files that say nothing of what was trained."""


@dataclass(frozen=True)
class Manifest:
    """What one run trained.

    Attributes:
        base_model: folder or hub name of the base model's weights.
        base_model_revision: its revision on the hub, where the recipe names one.
        adapter: the adapter that the recipe asked for; None for full fine-tuning.
        rope_preset: name of the RoPE preset, or `none`; what `auto` chose where it was asked.
        rope_reason: why `auto` chose it; None otherwise.
        config_fields: RoPE fields of the trained model's config.json, by name; {} where RoPE is the
            base model's.
        rope_parameters: `rope_parameters` of the trained model.
        pretrained_context, base_context, target_context: tokens of pretraining, tokens that the
            base model handles, tokens that were trained for.
        group_size: tokens in a group of shifted attention; None without it.
        attention_pattern: name of the pattern; None without shifted attention.
        full_attention_below: documents up to this many tokens used full attention.
        covered_layers: number of layers trained with shifted attention.
        uncovered_layers: reason → number of attention layers that kept the model's own attention.
        steps: optimizer steps done.
        full_attention_steps: how many of them ran with full attention, at the end.
        trainable: kinds of modules trained in addition to LoRA.
        trained_modules, trained_parameters: how many these were.
        recipe: the recipe, without secrets.
        recipe_digest: SHA-256 of the recipe as JSON.
        data_digests: path of each local data file → SHA-256.
        versions: package → version.
        results: figures measured after training: mappings with `metric`, `value` and more.
        files: name of each of `TIED_FILES` → SHA-256 of its content, in the folder of this file.
    """

    base_model: str
    target_context: int
    adapter: str | None = None
    base_model_revision: str | None = None
    rope_preset: str = "none"
    rope_reason: str | None = None
    config_fields: dict[str, Any] = field(default_factory=dict)
    rope_parameters: dict[str, Any] = field(default_factory=dict)
    pretrained_context: int | None = None
    base_context: int | None = None
    group_size: int | None = None
    attention_pattern: str | None = None
    full_attention_below: int = 0
    covered_layers: int = 0
    uncovered_layers: dict[str, int] = field(default_factory=dict)
    steps: int = 0
    full_attention_steps: int = 0
    trainable: list[str] = field(default_factory=list)
    trained_modules: int = 0
    trained_parameters: int = 0
    recipe: dict[str, Any] = field(default_factory=dict)
    recipe_digest: str | None = None
    data_digests: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    results: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `longlora.json` into a folder; an existing file is replaced only by a whole one."""
    files = {name: _content(folder / name) for name in TIED_FILES if (folder / name).is_file()}
    write_json(folder / FILE, {"format": FORMAT, **asdict(replace(manifest, files=files))})


def read_manifest(folder: str | Path) -> Manifest | None:
    """The manifest of a folder; None where it has none.

    Raises:
        ValueError: the file is cut off, or of a later format.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        known = {each.name for each in fields(Manifest)}
        if content["format"] > FORMAT:
            raise ValueError(
                f"{path} has format {content['format']}, this version reads up to {FORMAT}; "
                "install a newer longlora-plugin"
            )
        return Manifest(**{key: value for key, value in content.items() if key in known})
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} is damaged or cut off: {error!r}; delete it, or train again"
        ) from None


def find_manifest(name: str) -> Manifest:
    """The manifest of a folder, or of a model on the Hugging Face hub.

    Raises:
        ValueError: there is neither, or it has no `longlora.json`.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        try:
            folder = Path(hf_hub_download(name, FILE)).parent
        except (OSError, ValueError) as error:
            offline = isinstance(error, LocalEntryNotFoundError)
            if offline or not isinstance(error, EntryNotFoundError):
                reason = "the Hugging Face hub cannot be reached, or HF_HUB_OFFLINE is set"
                raise ValueError(
                    f"there is no folder {name}, and no model of that name was found: "
                    f"{reason if offline else str(error).strip().splitlines()[0]}"
                ) from None
    manifest = read_manifest(folder)
    if manifest is None:
        raise ValueError(
            f"{name} has no {FILE}; give a folder that training or merging with longlora-plugin "
            "wrote, or a model on the hub that was uploaded from one"
        )
    return manifest


def check_files(folder: str | Path, manifest: Manifest | None) -> None:
    """Refuse an adapter whose folder has another run's files, which began there and was stopped.

    Raises:
        ValueError: names the file, and says what to write.
    """
    for name, content in (manifest.files if manifest else {}).items():
        path = Path(folder) / name
        if path.is_file() and _content(path) != content:
            raise ValueError(
                f"the adapter in {folder} was saved with another {name}, as its {FILE} says: a "
                "later run began in the same folder and did not finish, or the file was edited. "
                "Write lora_model_dir: <a checkpoint of the run you mean>, train again, or delete "
                f"{FILE} to use the files as they are"
            )


def _content(path: Path) -> str:
    """SHA-256 of what a JSON file says of the trained model, whatever the order of its lists."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {k: plain(v) for k, v in value.items() if k not in CHANGES_IN_USE}
        if isinstance(value, list) and all(isinstance(each, str) for each in value):
            return sorted(value)
        return [plain(each) for each in value] if isinstance(value, list) else value

    text = json.dumps(plain(read_json(path)), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def public_recipe(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe as plain JSON types, without secrets and without the place of its file."""
    plain = json.loads(json.dumps(dict(recipe), default=str))
    return {
        key: value
        for key, value in plain.items()
        if key != "axolotl_config_path" and not SECRET.search(key)
    }


def digest(recipe: Mapping[str, Any]) -> str:
    """SHA-256 of a recipe, the same whatever the order of its keys."""
    text = json.dumps(public_recipe(recipe), sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def data_digests(recipe: Mapping[str, Any]) -> dict[str, str]:
    """SHA-256 of each local file that the recipe's `datasets` and `test_datasets` name."""
    found = {}
    for section in ("datasets", "test_datasets"):
        rows = recipe.get(section)
        for row in rows if isinstance(rows, list) else []:
            names = row.get("data_files") or row.get("path") if isinstance(row, Mapping) else None
            for name in [names] if isinstance(names, str) else names or []:
                if Path(name).is_file():
                    with Path(name).open("rb") as file:
                        found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Installed versions; by default of the packages that a run depends on."""
    found = {}
    for package in packages:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def why_another_rope(manifest: Manifest, rope_parameters: Mapping[str, Any]) -> str | None:
    """How the RoPE that an adapter was trained with differs from another; None if it does not."""
    trained = manifest.rope_parameters
    if not trained or trained == rope_parameters:
        return None
    return f"it was trained with rope_parameters {trained}, this run has {rope_parameters}"

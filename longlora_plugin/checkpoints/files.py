"""Files of a run's folders: what an adapter, a checkpoint and a whole model consist of, and how one
is written whole or not at all, so that a killed process leaves the earlier version.
"""

from __future__ import annotations

import json
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
"""Names of an adapter's weights, PEFT's present one first."""
MODEL_WEIGHTS = ("*.safetensors", "*.bin", "*.gguf")
NO_WEIGHTS = ("training_args.bin", "optimizer.bin", "scheduler.bin")


def checkpoints(output_dir: Path) -> list[Path]:
    """The `checkpoint-<step>` folders of a run, oldest first."""
    folders = (
        folder
        for folder in output_dir.glob("checkpoint-*")
        if folder.is_dir() and folder.name.removeprefix("checkpoint-").isdigit()
    )
    return sorted(folders, key=lambda folder: int(folder.name.removeprefix("checkpoint-")))


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a PEFT adapter, by the names of its files."""
    return (folder / ADAPTER_CONFIG).is_file() and adapter_weights(folder) is not None


def adapter_weights(folder: Path) -> Path | None:
    """An adapter's file of weights; None where there is none."""
    return next((folder / name for name in ADAPTER_FILES if (folder / name).is_file()), None)


def is_model(folder: Path) -> bool:
    """Whether a folder holds a whole model, by the names of its files."""
    return (folder / "config.json").is_file() and any(weight_files(folder))


def weight_files(folder: Path) -> Iterator[Path]:
    """Files of weights in a folder, not below it."""
    for pattern in MODEL_WEIGHTS:
        yield from (file for file in sorted(folder.glob(pattern)) if file.name not in NO_WEIGHTS)


def why_no_adapter(folder: Path) -> str | None:
    """What an adapter's folder lacks; None if it can be loaded."""
    if not folder.is_dir():
        return "there is no such folder"
    if not (folder / ADAPTER_CONFIG).is_file():
        return f"it has no {ADAPTER_CONFIG}"
    if adapter_weights(folder) is None:
        return f"it has no {ADAPTER_FILES[0]}"
    # A run's folder may hold checkpoints and a merged model too; they are not the adapter.
    return next(unreadable_files(folder, below=False), None)


def unreadable_files(folder: Path, *, below: bool = True) -> Iterator[str]:
    """A line for each file of weights or states that is cut off or damaged."""
    from safetensors import SafetensorError, safe_open

    find = folder.rglob if below else folder.glob
    for file in sorted(find("*.safetensors")):
        try:
            with safe_open(file, framework="numpy"):
                pass
        except SafetensorError:
            yield f"its {file.name} is cut off or damaged"
    for pattern in ("*.pt", "*.pth", "*.bin"):
        for file in sorted(find(pattern)):
            # torch.save writes a zip archive, whose directory is at its end.
            if file.name != "training_args.bin" and not zipfile.is_zipfile(file):
                yield f"its {file.name} is cut off or damaged"


TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path to write to; it takes the place of `path` when the block ends without an error."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def as_json(content: Any, *, sort_keys: bool = False) -> str:
    """Anything as the text of a JSON file, indented."""
    text = json.dumps(content, indent=2, sort_keys=sort_keys, ensure_ascii=False, default=str)
    return text + "\n"


def write_json(path: Path, content: Mapping[str, Any], *, sort_keys: bool = True) -> None:
    """Write a JSON file in one step."""
    write_text(path, as_json(content, sort_keys=sort_keys))


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: it cannot be read, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON, it was cut off or damaged: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a JSON object")
    return content


def write_text(path: Path, text: str) -> None:
    """Write a text file in one step; a link keeps its place, a device or a pipe is written to."""
    path = path.resolve()
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def check_writable(path: Path) -> None:
    """Find out before long work whether its result can be written; leaves no trace in the file.

    Raises:
        ValueError: says why not.
    """
    target = path.resolve()
    try:
        if target.is_dir():
            raise IsADirectoryError(0, "it is a folder")
        if target.exists():
            with target.open("ab"):
                pass
        if target.is_file() or not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=target.parent):
                pass
    except OSError as error:
        raise ValueError(
            f"cannot write {path}: {error.strerror}; give a file in a folder you may write to"
        ) from None

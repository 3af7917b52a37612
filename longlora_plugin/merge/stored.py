"""The base model's files, and what their tensors are in the model that transformers builds.

transformers 5 renames and fuses tensors while it loads (Mixtral's experts are one tensor a layer),
and takes them apart again while it saves. An adapter speaks of the model, a merge of the files:
`Layout` goes from one to the other, a group of tensors at a time, by transformers' own rules.
"""

from __future__ import annotations

import copy
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


def files_to_load(folder: Path) -> list[Path]:
    """The files that hold a model folder's weights, in transformers' order of preference.

    Raises:
        ValueError: there are none, or an index names files that are not there.
    """
    for whole, index in ((WHOLE, INDEX), (BIN, BIN_INDEX)):
        if (folder / whole).is_file():
            return [folder / whole]
        if (folder / index).is_file():
            content = json.loads((folder / index).read_text(encoding="utf-8"))
            names = sorted(set(content["weight_map"].values()))
            missing = [name for name in names if not (folder / name).is_file()]
            if missing:
                raise ValueError(
                    f"{folder} is incomplete: {index} names {', '.join(missing)}, which is not "
                    "there; get it again"
                )
            return [folder / name for name in names]
    raise ValueError(f"{folder} has no weights: neither {WHOLE} nor {BIN}, nor an index of them")


DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""A name in a safetensors file → torch's."""


class StoredWeights:
    """Tensors of a model folder, read one at a time.

    Raises:
        ValueError: there are none, or a file is cut off or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.files = files_to_load(folder)
        self._file_of = {name: file for file in self.files for name in _open(file)}

    def __iter__(self) -> Any:
        return iter(self._file_of)

    def __contains__(self, name: object) -> bool:
        return name in self._file_of

    def tensor(self, name: str) -> Any:
        return _open(self._file_of[name])[name]

    def dtype(self) -> str | None:
        """The dtype of most values in safetensors files, as torch names it; None for others."""
        from safetensors import safe_open

        values: Counter[str] = Counter()
        for file in self.files:
            if file.suffix == ".safetensors":
                with safe_open(file, framework="numpy") as opened:
                    for name in opened.keys():  # noqa: SIM118  (it cannot be iterated over)
                        part = opened.get_slice(name)
                        values[part.get_dtype()] += math.prod(part.get_shape())
        return DTYPES.get(values.most_common(1)[0][0]) if values else None

    def largest_file(self) -> int:
        """Bytes."""
        return max(file.stat().st_size for file in self.files)


class _Safetensors(Mapping[str, Any]):
    def __init__(self, file: Any) -> None:
        self._file, self._names = file, file.keys()

    def __getitem__(self, name: str) -> Any:
        return self._file.get_tensor(name)

    def __iter__(self) -> Any:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@lru_cache(maxsize=4)
def _open_as_it_is(file: Path, _size: int, _changed: int) -> Mapping[str, Any]:
    import pickle

    import torch
    from safetensors import SafetensorError, safe_open

    try:
        if file.suffix == ".safetensors":
            return _Safetensors(safe_open(file, framework="pt").__enter__())
        return torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, pickle.UnpicklingError):
        raise ValueError(
            f"{file.parent}: {file.name} is cut off or damaged; get it again"
        ) from None


def _open(file: Path) -> Mapping[str, Any]:
    state = file.stat()
    return _open_as_it_is(file, state.st_size, state.st_mtime_ns)


@dataclass
class Group:
    """Stored tensors that become one tensor of the model, or that one stored tensor becomes.

    Attributes:
        target: name of the (first) tensor in the model.
        sources: (stored name, transformers' pattern of it).
        converter: what fuses or splits them; None where a tensor is only renamed.
    """

    target: str
    sources: list[tuple[str, str]] = field(default_factory=list)
    converter: Any = None

    @property
    def splits(self) -> bool:
        """Whether one stored tensor becomes several of the model's."""
        return self.converter is not None and len(self.converter.target_patterns) > 1


class Layout:
    """How stored names and tensors become the model's, and back.

    Args:
        model: the model, on the meta device.
        stored: the names in the base's files.

    Attributes:
        groups: in the files' natural order.
        foreign: stored names that are no part of the model (another head, layers that predict
            several tokens): a merge passes them on.
    """

    def __init__(self, model: Any, stored: Iterable[str]) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )

        self._model = model
        conversions = get_model_conversion_mapping(model)
        self._renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
        converters = [each for each in conversions if isinstance(each, WeightConverter)]
        by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
        known, prefix = model.state_dict(), model.base_model_prefix
        groups: dict[str, Group] = {}
        self.foreign: list[str] = []
        for name in sorted(stored, key=dot_natural_key):
            target, pattern = rename_source_key(name, self._renamings, converters, prefix, known)
            if target not in known and name in known:
                target, pattern = name, None
            if target not in known:
                self.foreign.append(name)
                continue
            group = groups.setdefault(target, Group(target))
            group.sources.append((name, pattern or name))
            if pattern is not None:
                group.converter = by_pattern[pattern]
        self.groups = list(groups.values())

    def load(self, group: Group, stored: StoredWeights) -> dict[str, Any]:
        """Name in the model → tensor, in the dtype that is stored."""
        if group.converter is None:
            return {group.target: stored.tensor(group.sources[0][0])}
        converter = copy.deepcopy(group.converter)
        for name, pattern in group.sources:
            converter.add_tensor(group.target, name, pattern, stored.tensor(name))
        return self._convert(converter, group.target)

    def unload(self, group: Group, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """Stored name → tensor: the way back.

        Raises:
            ValueError: transformers cannot take these apart as they were stored.
        """
        from transformers.core_model_loading import rename_source_key

        if group.converter is None:
            return {name: tensors[group.target] for name, _ in group.sources}
        reverse = group.converter.reverse_transform()
        first = ""
        for name, tensor in tensors.items():
            renamed, pattern = rename_source_key(name, [], [reverse], reverse=True)
            first = first or renamed
            reverse.add_tensor(renamed, name, pattern, tensor)
        parts = self._convert(reverse, first)
        between = {
            rename_source_key(name, self._renamings, [])[0]: name for name, _ in group.sources
        }
        stored = {_same_name(part, between): tensor for part, tensor in parts.items()}
        if None in stored or len(stored) != len(group.sources):
            raise ValueError(
                f"{group.target} cannot be stored as the base model's files have it "
                f"({group.sources[0][0]}, …): transformers would write {next(iter(parts))}, …"
            )
        return {str(name): tensor for name, tensor in stored.items()}

    def _convert(self, converter: Any, name: str) -> dict[str, Any]:
        converted = converter.convert(name, model=self._model, config=self._model.config)
        return {
            name: value[0] if isinstance(value, list) else value
            for name, value in converted.items()
        }


def _same_name(part: str, between: Mapping[str, str]) -> str | None:
    """The stored name of a part, whose prefix transformers may have added or removed."""
    if part in between:
        return between[part]
    found = [
        name
        for middle, name in between.items()
        if part.endswith(f".{middle}") or middle.endswith(f".{part}")
    ]
    return found[0] if len(found) == 1 else None

"""The base's weights with the adapter merged into them, from file to file.

One tensor (of fused experts: one layer's) is in memory at a time, and the output file that is being
filled. The files keep the base's layout: names, dtypes and about the size of its shards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from longlora_plugin.checkpoints.files import write_json
from longlora_plugin.merge.adapted import AdaptedModel
from longlora_plugin.merge.stored import INDEX, WHOLE, Group, Layout, StoredWeights


def merge_weights(
    base_dir: Path,
    adapted: AdaptedModel,
    target: Path,
    *,
    rounding: Callable[[Any], Any] | None = None,
    rounded: frozenset[str] = frozenset(),
) -> tuple[bool, list[str]]:
    """Write the trained model's weights.

    Args:
        base_dir: folder of the base model.
        target: folder to write to, without weights.
        rounding: what training did to the base's quantized weights.
        rounded: their names in the model.

    Returns:
        Whether embeddings and output head are one tensor in what is written, and notes.

    Raises:
        ValueError: the base lacks a tensor that the adapter changes, or a result is not finite.
    """
    stored = StoredWeights(base_dir)
    layout = Layout(adapted.base, stored)
    targets = {group.target for group in layout.groups}
    writer = _Shards(target, stored.largest_file())
    values = _Values(adapted, rounding, rounded)
    tied = True
    for group in layout.groups:
        if _stays(group, stored, adapted, rounded):
            for name, _ in group.sources:
                writer.add(name, stored.tensor(name))
            continue
        before = layout.load(group, stored)
        after = {name: values.of(name, tensor) for name, tensor in before.items()}
        for name, tensor in layout.unload(group, after).items():
            writer.add(name, tensor)
        # Names of the same tensor that the base does not store.
        for name in adapted.ties.get(group.target, set()) - targets:
            tensor = values.of(name, before[group.target])
            if not are_equal(tensor, after[group.target]):
                tied = False
                writer.add(name, tensor)
    for name in sorted(adapted.changed - values.done):
        trained = adapted.trained(name)
        if trained is None:
            raise ValueError(f"the base model's files have no {name}, which the adapter changes")
        writer.add(name, trained)  # a reward model's head
    for name in layout.foreign:
        writer.add(name, stored.tensor(name))
    writer.finish()
    return tied, values.notes


class _Values:
    """What the base's tensors become, which have been asked for, and what a user should know."""

    def __init__(
        self, adapted: AdaptedModel, rounding: Callable[[Any], Any] | None, rounded: frozenset[str]
    ) -> None:
        self._adapted, self._rounding, self._rounded = adapted, rounding, rounded
        self.done: set[str] = set()
        self.notes: list[str] = []

    def of(self, name: str, tensor: Any) -> Any:
        self.done.add(name)
        fitted = _fit_rows(tensor, self._adapted.shape(name))
        if fitted is not tensor and self._adapted.trained(name) is None:
            self.notes.append(_note_rows(name, len(tensor), len(fitted)))
        rounding = self._rounding if name in self._rounded else None
        return self._adapted.value(name, fitted, rounding).to(tensor.dtype)


def _stays(
    group: Group, stored: StoredWeights, adapted: AdaptedModel, rounded: frozenset[str]
) -> bool:
    """Whether the stored tensors go to the merged files as they are."""
    names = adapted.ties.get(group.target, {group.target})
    if group.splits or any(name in adapted.changed or name in rounded for name in names):
        return False
    if group.converter is not None:
        return True
    return tuple(stored.tensor(group.sources[0][0]).shape) == adapted.shape(group.target)


def _fit_rows(tensor: Any, shape: tuple[int, ...]) -> Any:
    """A table (or its bias) with as many rows as the trained model's.

    New rows are the mean of the base's, as transformers and the original LongLoRA begin with.
    """
    import torch

    if tuple(tensor.shape) == shape or tensor.shape[1:] != shape[1:]:
        return tensor
    if len(tensor) >= shape[0]:
        return tensor[: shape[0]]
    mean = tensor.float().mean(dim=0, keepdim=True).to(tensor.dtype)
    return torch.cat([tensor, mean.expand(shape[0] - len(tensor), *shape[1:])])


def _note_rows(name: str, before: int, after: int) -> str:
    if after < before:
        return f"{name} has {after} of the base model's {before} rows, as the trained model"
    return (
        f"{name} has {after} rows, the base model's {before}: the adapter does not hold the new "
        "ones, so they are the mean of the others"
    )


def are_equal(one: Any, other: Any) -> bool:
    """Whether two tensors are the same in the dtype of the first."""
    return one.shape == other.shape and bool((one == other.to(one.dtype)).all())


class _Shards:
    """Files of about `limit` bytes, in the layout that transformers saves."""

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder, self._limit = folder, limit
        self._open: dict[str, Any] = {}
        self._files: list[list[str]] = []
        self._bytes = self._all_bytes = 0

    def add(self, name: str, tensor: Any) -> None:
        size = tensor.numel() * tensor.element_size()
        if self._open and self._bytes + size > self._limit:
            self._flush()
        self._open[name] = tensor.contiguous()
        self._bytes += size
        self._all_bytes += size

    def finish(self) -> None:
        self._flush()
        total = len(self._files)
        if total == 1:
            self._draft(1).rename(self._folder / WHOLE)
            return
        weight_map = {}
        for number, names in enumerate(self._files, start=1):
            file = f"model-{number:05}-of-{total:05}.safetensors"
            self._draft(number).rename(self._folder / file)
            weight_map.update(dict.fromkeys(names, file))
        index: Mapping[str, Any] = {
            "metadata": {"total_size": self._all_bytes},
            "weight_map": weight_map,
        }
        write_json(self._folder / INDEX, index)

    def _flush(self) -> None:
        from safetensors.torch import save_file

        self._files.append(list(self._open))
        # Names of one stored tensor share memory, which safetensors refuses.
        tensors = {name: tensor.clone() for name, tensor in self._open.items()}
        save_file(tensors, self._draft(len(self._files)), metadata={"format": "pt"})
        self._open, self._bytes = {}, 0

    def _draft(self, number: int) -> Path:
        return self._folder / f"part-{number:05}.safetensors"

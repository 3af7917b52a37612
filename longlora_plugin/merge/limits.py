"""Limits of tokenizer and generation that repeat an old context.

Left alone, a tokenizer warns and cuts, and generation stops, where the base model's context ended.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from longlora_plugin.checkpoints.files import read_json, write_json
from longlora_plugin.rope.base_config import maximum_of, text_config_of

LIMITS = {
    "tokenizer_config.json": ("model_max_length",),
    "generation_config.json": ("max_length",),
    "config.json": ("max_length", "model_max_length", "max_sequence_length", "seq_length"),
    "tokenizer.json": ("truncation.max_length",),
}


def raised_limit(limit: Any, old: Iterable[int], target: int) -> int | None:
    """The limit to write instead; None where it stays, being unset, another's or high enough."""
    if isinstance(limit, bool) or not isinstance(limit, int):
        return None
    return target if limit in set(old) and limit < target else None


def raise_limits(folder: Path, old: Iterable[int], target: int) -> list[str]:
    """Raise the limits in a folder's files that repeat a context of the base model.

    Args:
        old: the base's contexts, in tokens: pretrained, as it is, its config's maximum.
        target: the trained context, in tokens.

    Returns:
        A line for each limit that was raised.
    """
    old, notes = set(old), []
    for file, keys in LIMITS.items():
        path = folder / file
        if not path.is_file():
            continue
        content = read_json(path)
        raised = []
        for key in keys:
            *sections, name = key.split(".")
            section = content
            for each in sections:
                section = section.get(each) or {}
            limit = raised_limit(section.get(name), old, target)
            if limit is not None:
                section[name] = limit
                raised.append(f"{file} has {key}: {limit}")
        if raised:
            # As the file orders them: a tokenizer's vocabulary is in there.
            write_json(path, content, sort_keys=False)
        notes += raised
    return notes


def raise_limits_of(trainer: Any, base_config: Any, old: Iterable[int], target: int) -> None:
    """The same for what a run will save: its tokenizer and the model's generation config.

    Args:
        old: the base's contexts, in tokens; its config's maximum is one in any case.
        target: what the run extends to, in tokens; the model's maximum counts where it is higher.
    """
    before, trained = (
        maximum_of(text_config_of(config)) or 0 for config in (base_config, trainer.model.config)
    )
    old, target = {*old, before}, max(trained, target)
    generation = getattr(trainer.model, "generation_config", None)
    for owner, name in (
        (trainer.processing_class, "model_max_length"),
        (generation, "max_length"),
    ):
        limit = raised_limit(getattr(owner, name, None), old, target)
        if limit is not None:
            setattr(owner, name, limit)

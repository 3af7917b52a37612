"""Can this data extend a context? Only documents that are longer than the base model's context can.

Tokens in a document's first `base_context` places see nothing that the base model did not see
already; what RoPE was scaled for is trained by the tokens after them. Rows that are packed from
several documents count as those documents, each of which starts at position 0.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from logging import Logger, LoggerAdapter
from typing import Any

from longlora_plugin.run.prepare import PreparedRun

ROW_COLUMNS = ("input_ids", "prompt_ids", "prompt_input_ids")
"""Columns of tokens: those of a row, or those of a prompt that answers follow."""
ANSWER_COLUMNS = ("chosen_ids", "chosen_input_ids", "completion_ids")
BATCH = 1000


@dataclass(frozen=True)
class DocumentLengths:
    """How long the documents of some training data are.

    Attributes:
        documents: how many there are.
        tokens: in all of them.
        longest: tokens in the longest.
        beyond: tokens that are further in their document than `base_context`.
        base_context: tokens that the base model handles as it is.
        target_context: the recipe's `sequence_len`.
    """

    documents: int
    tokens: int
    longest: int
    beyond: int
    base_context: int
    target_context: int

    @classmethod
    def of(cls, lengths: Iterable[int], base_context: int, target_context: int) -> DocumentLengths:
        """Measure documents of these lengths, in tokens."""
        known = [int(length) for length in lengths]
        beyond = sum(max(0, length - base_context) for length in known)
        return cls(
            len(known), sum(known), max(known, default=0), beyond, base_context, target_context
        )

    @property
    def share_beyond(self) -> float:
        """Share of the tokens that train the new part of the context."""
        return self.beyond / self.tokens if self.tokens else 0.0

    def __str__(self) -> str:
        return (
            f"{self.documents:,} documents, the longest {self.longest:,} tokens; "
            f"{self.share_beyond:.1%} of their tokens are beyond the base model's context of "
            f"{self.base_context:,}"
        )

    def warning(self) -> str | None:
        """What to say where the data cannot extend the context; None where it can."""
        if self.target_context <= self.base_context or self.beyond:
            return None
        return (
            f"this data cannot extend the context from {self.base_context:,} to "
            f"{self.target_context:,} tokens: no document is longer than {self.base_context:,} "
            f"(the longest of {self.documents:,} has {self.longest:,}). Train on longer documents, "
            "whole books or repositories, or build rows from yours: longlora longqa build. "
            "sample_packing does not help: packed documents do not see each other"
        )


def lengths_in(dataset: Any) -> list[int] | None:
    """Lengths of the documents in a dataset of tokens, in tokens.

    Args:
        dataset: a `datasets.Dataset` with `input_ids`, or with prompts and answers. Where it has
            `position_ids`, a document starts wherever they are 0.

    Returns:
        None where it has no such columns or is streamed, so that nobody can know.
    """
    columns = getattr(dataset, "column_names", None) or []
    row = next((name for name in ROW_COLUMNS if name in columns), None)
    if row is None or not hasattr(dataset, "__len__"):
        return None
    answer = next((name for name in ANSWER_COLUMNS if name in columns), None)
    wanted = [row, answer] if answer else [row]
    if row == "input_ids" and "position_ids" in columns:
        wanted = ["position_ids"]
    lengths: list[int] = []
    for batch in dataset.select_columns(wanted).with_format("arrow").iter(BATCH):
        lengths += _lengths_of(batch, wanted)
    return lengths


def report_data(run: PreparedRun, dataset: Any, log: Logger | LoggerAdapter[Any]) -> None:
    """Say how long the documents that train are, and warn where none can extend the context."""
    lengths = lengths_in(dataset)
    if lengths is None:
        log.info("LongLoRA data: the lengths of documents are not known before they are read")
        return
    measured = DocumentLengths.of(lengths, run.base_context or 0, run.target_context)
    log.info("LongLoRA data: %s", measured)
    if warning := measured.warning():
        log.warning("LongLoRA: %s", warning)


def _lengths_of(batch: Any, columns: list[str]) -> list[int]:
    import numpy as np
    import pyarrow.compute as pc

    rows = [pc.list_value_length(batch[name]).to_numpy(zero_copy_only=False) for name in columns]
    counts = np.sum(rows, axis=0)
    if columns != ["position_ids"]:
        return [int(count) for count in counts]
    positions = pc.list_flatten(batch["position_ids"]).to_numpy(zero_copy_only=False)
    begins = np.concatenate([[0], np.cumsum(counts)])
    starts = np.unique(np.concatenate([np.flatnonzero(positions == 0), begins]))
    return [int(length) for length in np.diff(starts)]

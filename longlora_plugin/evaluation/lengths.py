"""Perplexity by context length: one row for each model and length, over the same tokens.

Rows of one run are comparable: they score the very same tokens, those of the documents that reach
the longest length, and differ in how far back the model sees.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longlora_plugin.evaluation.data import Corpus
from longlora_plugin.evaluation.long_ppl import KeyTokens, long_perplexity
from longlora_plugin.evaluation.models import ModelSource
from longlora_plugin.evaluation.perplexity import Scores, score_documents
from longlora_plugin.evaluation.processes import Processes
from longlora_plugin.evaluation.results import Row, read_rows, settings_digest, write_rows
from longlora_plugin.evaluation.token_file import TokenFile
from longlora_plugin.evaluation.windows import ScoreMode, bucket_edges_for, sliding_windows


@dataclass(frozen=True)
class Measurement:
    """What to measure, the same for every model.

    Attributes:
        lengths: context lengths, tokens.
        stride: tokens that a window moves by, at most its length; None for half of each length.
        score: see `windows`.
        buckets: see `windows.bucket_edges_for`.
        batch_size: windows in a forward pass; None for a default by length.
        long_ppl: how to find key tokens; None for no LongPPL.
        long_ppl_model: label of the model that finds them; None for the last one.
    """

    lengths: Sequence[int]
    stride: int | None = None
    score: ScoreMode = "new"
    buckets: int | Sequence[int] | None = None
    batch_size: int | None = None
    long_ppl: KeyTokens | None = None
    long_ppl_model: str | None = None

    def stride_for(self, length: int) -> int:
        if self.stride is None:
            return max(1, length // 2)
        # A stride for the longest windows reads shorter ones without overlap.
        return self.stride if self.stride > max(self.lengths) else min(self.stride, length)


@dataclass(frozen=True)
class Contexts:
    """Tokens the base model was made for, and tokens the recipe extends it to."""

    original: int
    target: int


def usable_lengths(corpus: Corpus, lengths: Sequence[int]) -> tuple[list[int], list[int]]:
    """Lengths that some document reaches, and those that none does, both rising.

    Raises:
        ValueError: no document reaches any length; says how many tokens there are.
    """
    longest = max(corpus.lengths, default=0)
    usable = sorted({length for length in lengths if length <= longest})
    if not usable:
        raise ValueError(
            f"{corpus.name}: its longest document has {longest} tokens "
            f"({sum(corpus.lengths)} in {len(corpus.lengths)} documents), fewer than the shortest "
            f"length {min(lengths)}. Give a length up to {longest}, or longer documents"
        )
    return usable, sorted(set(lengths) - set(usable))


def evaluate(
    sources: Sequence[ModelSource],
    corpus: Corpus,
    measurement: Measurement,
    contexts: Contexts,
    *,
    dtype: Any,
    processes: Processes,
    json_path: str | Path | None = None,
    tokens_path: str | Path | None = None,
    on_note: Callable[[str], None] = lambda note: None,
    on_progress: Callable[[str, int, int], None] = lambda what, tokens, total: None,
) -> list[Row]:
    """Measure every model at every length.

    Args:
        sources: the models; loaded one at a time, and only where a row is missing.
        dtype: torch dtype to compute in.
        json_path: file of rows: those it has for the very same settings are kept, and it is
            written anew after each row.
        tokens_path: file of token-level losses; see `token_file`.
        on_note: told what the user should know.
        on_progress: told what is measured, the tokens of a batch, and the tokens in all.

    Raises:
        ValueError: lengths, stride or buckets do not fit, or a file is in the way.
    """
    lengths, unreached = usable_lengths(corpus, measurement.lengths)
    if unreached:
        on_note(
            f"no document reaches {', '.join(map(str, unreached))} tokens "
            f"(the longest has {max(corpus.lengths)}): no rows for those lengths"
        )
    used = corpus.reaching(lengths[-1])
    if len(used.documents) < len(corpus.documents):
        on_note(
            f"{len(used.documents)} of {len(corpus.documents)} documents have {lengths[-1]} "
            "tokens; every length is measured on those, so that rows compare"
        )
    run = _Run(
        sources, used, measurement, contexts, dtype, processes, lengths, on_note, on_progress
    )
    kept: dict[str, Row] = processes.from_main(read_rows(json_path) if processes.main else None)
    tokens = TokenFile(tokens_path, used) if tokens_path and processes.main else None
    if tokens_path:
        held = processes.from_main(None if tokens is None else tokens.settings())
        kept = {settings: row for settings, row in kept.items() if settings in held}
    rows = {
        (source.label, length): kept.get(run.settings(source, length))
        for source in sources
        for length in lengths
    }
    missing = [key for key, row in rows.items() if row is None]
    if len(missing) < len(rows):
        on_note(f"{len(rows) - len(missing)} of {len(rows)} rows were already in {json_path}")

    def finished() -> list[Row]:
        return [row for row in rows.values() if row is not None]

    for row, losses, key in run.measure(missing):
        rows[row["model"], row["length"]] = row
        if not processes.main:
            continue
        if tokens is not None:
            tokens.add(row, losses, key)
        if json_path is not None:
            write_rows(json_path, finished())
    if json_path is not None and processes.main:
        write_rows(json_path, finished())
    return finished()


@dataclass
class _Run:
    sources: Sequence[ModelSource]
    corpus: Corpus
    measurement: Measurement
    contexts: Contexts
    dtype: Any
    processes: Processes
    lengths: list[int]
    on_note: Callable[[str], None]
    on_progress: Callable[[str, int, int], None]

    def __post_init__(self) -> None:
        for length in self.lengths:  # wrong strides and buckets are errors before a model loads
            sliding_windows([], length, self.measurement.stride_for(length))
            self._edges(length)
        self.evaluator = self._evaluator() if self.measurement.long_ppl else None
        self._described = {
            source.label: {**source.identity(), "model": source.label} for source in self.sources
        }
        self._common = {
            "data": self.corpus.digest,
            "score": self.measurement.score,
            "dtype": str(self.dtype),
            "device": self.processes.device.partition(":")[0],
            "contexts": dataclasses.astuple(self.contexts),
            "long_ppl": None
            if self.measurement.long_ppl is None or self.evaluator is None
            else {
                **dataclasses.asdict(self.measurement.long_ppl),
                "evaluator": self.evaluator.identity(),
            },
        }

    def _evaluator(self) -> ModelSource:
        label = self.measurement.long_ppl_model
        if label is None:
            return self.sources[-1]
        for source in self.sources:
            if source.label == label:
                return source
        labels = ", ".join(source.label for source in self.sources)
        raise ValueError(f"LongPPL's evaluator {label!r} is not among the models: {labels}")

    def _edges(self, length: int) -> list[int]:
        return bucket_edges_for(length, self.measurement.buckets, self.contexts.original)

    def settings(self, source: ModelSource, length: int) -> str:
        return settings_digest(
            {
                **self._common,
                **self._described[source.label],
                "length": length,
                "stride": self.measurement.stride_for(length),
                "edges": self._edges(length),
            }
        )

    def measure(
        self, missing: Sequence[tuple[str, int]]
    ) -> Iterator[tuple[Row, NDArray[np.float32], NDArray[np.bool_] | None]]:
        """Yield each missing row with its token losses and key tokens."""
        if not missing:
            return
        keys: dict[int, NDArray[np.bool_]] = {}
        scored: dict[tuple[str, int], tuple[Scores, float]] = {}
        finder = self.measurement.long_ppl
        if finder is not None and self.evaluator is not None:
            name = self.evaluator.label
            model = self._load(self.evaluator)
            short, _ = self._score(model, f"{name}, short", finder.window, finder.stride, "new")
            for length in sorted({length for _, length in missing}):
                scored[name, length] = self._score_at(model, name, length)
                keys[length] = finder.mask(scored[name, length][0].token_losses, short.token_losses)
            del model
        for source in self.sources:
            model = None
            for length in (length for label, length in missing if label == source.label):
                found = scored.pop((source.label, length), None)
                if found is None:
                    model = self._load(source) if model is None else model
                    found = self._score_at(model, source.label, length)
                scores, seconds = found
                key = keys.get(length)
                yield self._row(source, length, scores, seconds, key), scores.token_losses, key

    def _load(self, source: ModelSource) -> Any:
        return source.load(self.processes.device, self.dtype)

    def _score_at(self, model: Any, label: str, length: int) -> tuple[Scores, float]:
        stride = self.measurement.stride_for(length)
        return self._score(model, f"{label}, {length}", length, stride, self.measurement.score)

    def _score(
        self, model: Any, what: str, length: int, stride: int, score: ScoreMode
    ) -> tuple[Scores, float]:
        started = time.perf_counter()
        scores = score_documents(
            model,
            self.corpus.documents,
            length=length,
            stride=stride,
            score=score,
            edges=self._edges(length),
            batch_size=self.measurement.batch_size,
            device=self.processes.device,
            rank=self.processes.rank,
            processes=self.processes.count,
            gather=self.processes.gather,
            on_progress=lambda tokens, total: self.on_progress(what, tokens, total),
        )
        return scores, time.perf_counter() - started

    def _row(
        self,
        source: ModelSource,
        length: int,
        scores: Scores,
        seconds: float,
        key: NDArray[np.bool_] | None,
    ) -> Row:
        interval = scores.interval()
        perplexity = scores.perplexity
        if not math.isfinite(perplexity):
            self.on_note(f"{source.label} at {length}: the loss is not finite ({self.dtype})")
        row: Row = {
            "model": source.label,
            "length": length,
            "perplexity": perplexity if math.isfinite(perplexity) else None,
            "nll": scores.mean_loss if math.isfinite(perplexity) else None,
            "ci95": None if interval is None else [interval.low, interval.high],
            "ci_over": None if interval is None else interval.over,
            "tokens": int(scores.tokens.sum()),
            "windows": len(scores.windows),
            "documents": len(self.corpus.documents),
            "score": self.measurement.score,
            "stride": self.measurement.stride_for(length),
            "buckets": scores.buckets(),
            "bucket_scored": "every token of every window, by how many tokens it had seen",
        }
        if key is not None and self.evaluator is not None:
            row["long_ppl"] = {
                **long_perplexity(scores.token_losses, key),
                "evaluator": self.evaluator.label,
                **dataclasses.asdict(self.measurement.long_ppl),  # type: ignore[arg-type]
            }
        return {
            **row,
            "data": self.corpus.name,
            "data_digest": self.corpus.digest,
            "weights": source.weights,
            "adapter": None if source.adapter is None else str(source.adapter),
            "rope_parameters": source.rope,
            "base_context": self.contexts.original,
            "target_context": self.contexts.target,
            "attention": "full",
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": self.processes.device,
            "processes": self.processes.count,
            "seconds": round(seconds, 3),
            "settings": self.settings(source, length),
        }

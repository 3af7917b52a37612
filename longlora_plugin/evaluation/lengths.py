"""Perplexity by context length: one row for each model and length, over the same text.

Rows of one run are comparable: they score the very same documents, those that reach the longest
length in every tokenizer, and differ in how far back the model sees. Where models have different
tokenizers, perplexities count different tokens, and bits a byte compare.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from longlora_plugin.evaluation.data import Corpus
from longlora_plugin.evaluation.loading import LoadedModel, ModelSource
from longlora_plugin.evaluation.options import PerplexityOptions
from longlora_plugin.evaluation.perplexity import Execution, Scores, score_documents
from longlora_plugin.evaluation.processes import Processes
from longlora_plugin.evaluation.results import Row
from longlora_plugin.evaluation.rows import PerplexityFigures
from longlora_plugin.evaluation.sweep import Cell, Experiment
from longlora_plugin.evaluation.token_file import TokenFile
from longlora_plugin.evaluation.windows import bucket_edges_for, sliding_windows


@dataclass(frozen=True)
class Contexts:
    """Tokens that the base model handles as it is, and tokens it was extended to."""

    base: int
    target: int


def usable_lengths(corpora: Sequence[Corpus], lengths: Sequence[int]) -> tuple[list[int], int]:
    """Lengths that some document reaches in every tokenizer, rising, and the longest such document.

    Raises:
        ValueError: no document reaches any length; says how many tokens there are.
    """
    reached = _reached(corpora)
    longest = max(reached, default=0)
    usable = sorted({length for length in lengths if length <= longest})
    if not usable:
        raise ValueError(
            f"{corpora[0].name}: its longest document has {longest} tokens ({sum(reached)} in "
            f"{len(reached)} documents), fewer than the shortest length {min(lengths)}. Give a "
            f"length up to {longest}, or longer documents"
        )
    return usable, longest


def _reached(corpora: Sequence[Corpus]) -> list[int]:
    """Tokens of each document, in the tokenizer that has fewest."""
    return [min(counts) for counts in zip(*(corpus.lengths for corpus in corpora), strict=True)]


class PerplexityByLength(Experiment):
    """Sliding-window perplexity of every model at every length.

    Args:
        corpora: the same text in the tokens of each model, by label.
        options: `lengths` is not empty.
        tokens_path: file of token-level losses; see `token_file`.
        note: told what the user should know.

    Raises:
        ValueError: lengths, stride or buckets do not fit, or a file is in the way.
    """

    question = ("data", "score", "stride")

    def __init__(
        self,
        corpora: Mapping[str, Corpus],
        options: PerplexityOptions,
        contexts: Contexts,
        processes: Processes,
        note: Callable[[str], None] = lambda note: None,
    ) -> None:
        self.options, self.contexts, self.processes, self.note = options, contexts, processes, note
        every = list(corpora.values())
        self.lengths, longest = usable_lengths(every, options.lengths)
        unreached = sorted(set(options.lengths) - set(self.lengths))
        if unreached:
            note(
                f"no document reaches {', '.join(map(str, unreached))} tokens "
                f"(the longest has {longest}): no rows for those lengths"
            )
        used = [i for i, tokens in enumerate(_reached(every)) if tokens >= self.lengths[-1]]
        if len(used) < len(every[0].documents):
            note(
                f"{len(used)} of {len(every[0].documents)} documents have {self.lengths[-1]} "
                "tokens; every length is measured on those, so that rows compare"
            )
        self.corpora = {label: corpus.only(used) for label, corpus in corpora.items()}
        if len(options.buckets) == 1:
            raise ValueError(
                f"--buckets {options.buckets[0]} is one edge; write all of them, such as 0,256,512"
            )
        for length in self.lengths:  # wrong strides and buckets are errors before a model loads
            sliding_windows([], length, options.stride_for(length))
            self._edges(length)
        self.tokens = self._token_file(options.tokens)

    def _token_file(self, path: str | None) -> TokenFile | None:
        if path is None or not self.processes.main:
            return None
        if len({corpus.digest for corpus in self.corpora.values()}) > 1:
            raise ValueError(
                f"--tokens {path}: the models have different tokenizers, and a file holds the "
                "losses of one; measure those of one tokenizer with --model"
            )
        return TokenFile(path, next(iter(self.corpora.values())))

    def _edges(self, length: int) -> list[int]:
        return bucket_edges_for(length, self.options.buckets, self.contexts.base)

    def cells(self) -> list[Cell]:
        return [{"length": length} for length in self.lengths]

    def settings(self, source: ModelSource, cell: Cell) -> dict[str, Any]:
        return {
            **cell,
            "data": self.corpora[source.label].digest,
            "score": self.options.score,
            "contexts": [self.contexts.base, self.contexts.target],
            "stride": self.options.stride_for(cell["length"]),
            "edges": self._edges(cell["length"]),
        }

    def keeps(self, settings: str) -> bool:
        return self.tokens is None or settings in self.tokens.settings()

    def measure(
        self, model: LoadedModel, cell: Cell, progress: Callable[[int, int], None]
    ) -> PerplexityFigures:
        length, corpus = cell["length"], self.corpora[model.source.label]
        model.check_ids(corpus.largest_id)
        scores = score_documents(
            model.model,
            corpus.documents,
            length=length,
            stride=self.options.stride_for(length),
            score=self.options.score,
            edges=self._edges(length),
            execution=Execution(self.options.batch_size, model.device, self.processes, progress),
        )
        self._losses = scores.token_losses
        if not math.isfinite(scores.perplexity):
            self.note(f"{model.source.label} at {length}: the loss is not finite ({model.dtype})")
        return self._figures(scores, corpus, length)

    def finished(self, row: Row) -> None:
        if self.tokens is not None:
            self.tokens.add(row, self._losses)

    def _figures(self, scores: Scores, corpus: Corpus, length: int) -> PerplexityFigures:
        interval = scores.interval()
        finite = math.isfinite(scores.perplexity)
        tokens = sum(max(0, count - 1) for count in corpus.lengths)
        text_bytes = sum(len(text.encode()) for text in corpus.texts)
        characters = sum(map(len, corpus.texts))
        return {
            "perplexity": scores.perplexity if finite else None,
            "nll": scores.mean_loss if finite else None,
            "bits_per_byte": scores.mean_loss * tokens / text_bytes / math.log(2)
            if finite
            else None,
            "nll_per_character": scores.mean_loss * tokens / characters if finite else None,
            "ci95": None if interval is None else [interval.low, interval.high],
            "ci_over": None if interval is None else interval.over,
            "tokens": int(scores.tokens.sum()),
            "windows": len(scores.windows),
            "documents": len(corpus.documents),
            "score": self.options.score,
            "stride": self.options.stride_for(length),
            "buckets": scores.buckets(),
            "bucket_scored": "every token of every window, by how many tokens it had seen",
            "data": corpus.name,
            "data_digest": corpus.digest,
            "base_context": self.contexts.base,
            "target_context": self.contexts.target,
        }

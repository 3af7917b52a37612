"""Perplexity of a causal language model over sliding windows.

A window of n tokens goes through the model in one forward pass with the model's own full
attention; the vocabulary projection and its float32 loss are computed for a few positions at a
time, because float32 logits of a long window ([32768, 128256] is 16 GiB) would cost more memory
than the pass itself.

What is kept of a window is small: per position bucket the sum of losses and how many, and the loss
of each token scored for the first time. Perplexities, their confidence intervals and the tables
follow from these.

Shapes: B windows a batch, n tokens read, W windows, K buckets, V vocabulary, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from longlora_plugin.evaluation.options import ScoreMode
from longlora_plugin.evaluation.processes import ALONE, Processes
from longlora_plugin.evaluation.windows import Window, sliding_windows

CHUNK_ELEMENTS = 2**25
"""Float32 logits in memory at a time: 128 MiB."""

BATCH_TOKENS = 8192
"""Tokens in a forward pass where no batch size is given; a window is never split."""

RESAMPLES = 1000
"""Bootstrap resamples of a confidence interval."""

ENOUGH_DOCUMENTS = 20
"""From so many documents on, documents and not windows are resampled."""


def token_losses(model: nn.Module, ids: Tensor, *, whole_logits: bool | None = None) -> Tensor:
    """Negative log-likelihood, in nats, of each token given those before it in its row.

    Args:
        model: a transformers causal language model, plain or wrapped by PEFT.
        ids: token ids [B, n], without padding.
        whole_logits: True calls the model as a whole; None does so only where decoder and
            vocabulary projection, called one after the other, do not make up its logits
            (Gemma 2 caps them, Granite scales them).

    Returns:
        float32 [B, n − 1].
    """
    if whole_logits is None:
        whole_logits = not _splits_into_decoder_and_head(model, ids[:1, :8])
    if whole_logits:
        logits_BnV = model(input_ids=ids, use_cache=False).logits

        def logits_of(rows: slice) -> Tensor:
            return logits_BnV[:, rows]
    else:
        decoder, head = _decoder_and_head(model)
        hidden_BnD = decoder(input_ids=ids, use_cache=False).last_hidden_state

        def logits_of(rows: slice) -> Tensor:
            return head(hidden_BnD[:, rows])

    targets = ids[:, 1:]
    chunk = max(1, CHUNK_ELEMENTS // (ids.shape[0] * _vocabulary(model)))
    losses = []
    for first in range(0, targets.shape[1], chunk):
        rows = slice(first, min(first + chunk, targets.shape[1]))
        logits = logits_of(rows).float()
        losses.append(
            F.cross_entropy(logits.flatten(0, 1), targets[:, rows].flatten(), reduction="none")
        )
    return torch.cat([part.view(ids.shape[0], -1) for part in losses], dim=1)


def _decoder_and_head(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    causal: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    return causal.get_decoder(), causal.get_output_embeddings()


def _vocabulary(model: nn.Module) -> int:
    config: Any = model.config
    return int(config.get_text_config().vocab_size)


def _splits_into_decoder_and_head(model: nn.Module, ids: Tensor) -> bool:
    """Whether decoder + head give exactly the model's logits, tried on a few tokens."""
    if not hasattr(model, "get_decoder") and not hasattr(model, "get_base_model"):
        return False
    try:
        decoder, head = _decoder_and_head(model)
        if head is None:
            return False
        split = head(decoder(input_ids=ids, use_cache=False).last_hidden_state)
    except (AttributeError, TypeError, NotImplementedError):
        return False
    return torch.equal(split, model(input_ids=ids, use_cache=False).logits)


@dataclass(frozen=True)
class Interval:
    """A bootstrap confidence interval of a perplexity; `over` says what was resampled."""

    low: float
    high: float
    over: str


@dataclass(frozen=True)
class Scores:
    """Losses of one model at one length.

    Attributes:
        windows: the W windows, in reading order.
        edges: K + 1 bucket edges; bucket k holds positions edges[k] < p ≤ edges[k + 1].
        bucket_losses: summed losses in nats, float64 [W, K], over every token of each window.
        bucket_tokens: how many, int64 [W, K].
        losses: summed losses of the scored tokens, float64 [W].
        tokens: how many, int64 [W].
        token_losses: loss of every token where it was new, float32 [tokens], document by document,
            without each document's first; NaN for a token that no window reads (score `all`).
    """

    windows: list[Window]
    edges: list[int]
    bucket_losses: NDArray[np.float64]
    bucket_tokens: NDArray[np.int64]
    losses: NDArray[np.float64]
    tokens: NDArray[np.int64]
    token_losses: NDArray[np.float32]

    @property
    def mean_loss(self) -> float:
        """Mean loss of the scored tokens, in nats."""
        return float(self.losses.sum() / self.tokens.sum())

    @property
    def perplexity(self) -> float:
        return _exp(self.mean_loss)

    def buckets(self) -> list[dict[str, float | int | None]]:
        """Perplexity by position: every token of every window, by how many tokens it had seen.

        A bucket that no token falls into has perplexity None.
        """
        losses, tokens = self.bucket_losses.sum(0), self.bucket_tokens.sum(0)
        return [
            {
                "from": low,
                "to": high,
                "perplexity": _exp(loss / count) if count else None,
                "tokens": int(count),
            }
            for low, high, loss, count in zip(
                self.edges, self.edges[1:], losses, tokens, strict=False
            )
        ]

    def interval(self) -> Interval | None:
        """95 % bootstrap interval of the perplexity; None where there is one window only.

        Whole documents are resampled where there are enough of them, else windows: tokens of one
        window are no independent samples.
        """
        clusters = np.array([window.document for window in self.windows])
        documents = len(set(clusters.tolist()))
        over = "documents" if documents >= ENOUGH_DOCUMENTS else "windows"
        if over == "windows":
            clusters = np.arange(len(self.windows))
        return bootstrap(clusters, self.losses, self.tokens, over=over)


def bootstrap(
    clusters: NDArray[np.int64],
    losses: NDArray[np.float64],
    tokens: NDArray[np.int64],
    *,
    over: str,
) -> Interval | None:
    """95 % percentile bootstrap of exp(Σ losses / Σ tokens), resampling clusters with replacement.

    Args:
        clusters: which cluster each entry belongs to, [n].
        losses, tokens: summed loss and number of tokens of each entry, [n].
    """
    _, index = np.unique(clusters, return_inverse=True)
    count = int(index.max()) + 1
    if count < 2:
        return None
    loss_sums = np.bincount(index, weights=losses, minlength=count)
    token_sums = np.bincount(index, weights=tokens, minlength=count)
    random = np.random.default_rng(0)
    means = np.empty(RESAMPLES)
    for resample in range(RESAMPLES):
        drawn = random.integers(count, size=count)
        means[resample] = loss_sums[drawn].sum() / max(token_sums[drawn].sum(), 1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(_exp(low), _exp(high), over)


@dataclass(frozen=True)
class Execution:
    """How windows go through the model; no figure depends on it.

    Attributes:
        batch_size: windows in a forward pass; None for as many as make `BATCH_TOKENS` tokens.
        device: where the model's input goes.
        processes: this process takes every `processes.count`-th batch.
        on_progress: told, after each batch, its tokens and those of this process in all.
    """

    batch_size: int | None = None
    device: torch.device | str = "cpu"
    processes: Processes = ALONE
    on_progress: Callable[[int, int], None] = lambda tokens, total: None


AS_IT_IS = Execution()


def score_documents(
    model: nn.Module,
    documents: Sequence[NDArray[np.int32]],
    *,
    length: int,
    stride: int,
    score: ScoreMode = "new",
    edges: Sequence[int] | None = None,
    execution: Execution = AS_IT_IS,
) -> Scores:
    """Read documents through sliding windows and score their tokens.

    Args:
        model: a causal language model; it is put into evaluation mode.
        documents: token ids [tokens], one array a document.
        length, stride, score: see `windows.sliding_windows`.
        edges: bucket edges; None for one bucket.

    Raises:
        ValueError: no window fits.
    """
    edges = [0, length] if edges is None else list(edges)
    windows = sliding_windows([len(document) for document in documents], length, stride, score)
    if not windows:
        raise ValueError(f"no document has the {length} tokens of a window")
    model.eval()
    processes = execution.processes
    batches = list(_batches(windows, execution.batch_size or max(1, BATCH_TOKENS // length)))
    parts: list[Any] = []
    whole_logits: bool | None = None
    mine = batches[processes.rank :: processes.count]
    total = sum(windows[w].read for batch in mine for w in batch)
    for batch in mine:
        ids = torch.from_numpy(
            np.stack(
                [documents[windows[w].document][windows[w].start : windows[w].end] for w in batch]
            ).astype(np.int64)
        ).to(execution.device)
        with torch.inference_mode():
            if whole_logits is None:
                whole_logits = not _splits_into_decoder_and_head(model, ids[:1, :8])
            losses = token_losses(model, ids, whole_logits=whole_logits).cpu().numpy()
        for row, w in zip(losses, batch, strict=True):
            parts.append((w, *_summary(windows[w], row, edges)))
        execution.on_progress(ids.numel(), total)
    lengths = [len(document) for document in documents]
    return _scores(windows, edges, processes.gather(parts), lengths)


def _batches(windows: Sequence[Window], batch_size: int) -> Iterator[list[int]]:
    """Indices of windows, in order, batched where they are of one length: none is padded."""
    batch: list[int] = []
    for index, window in enumerate(windows):
        if batch and (len(batch) == batch_size or windows[batch[0]].read != window.read):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _summary(
    window: Window, losses: NDArray[np.float32], edges: Sequence[int]
) -> tuple[NDArray[np.float64], NDArray[np.int64], float, NDArray[np.float32]]:
    positions = np.arange(1, window.read)
    bucket = np.searchsorted(edges, positions, side="left") - 1
    bucket = np.minimum(bucket, len(edges) - 2)
    wide = losses.astype(np.float64)
    sums = np.bincount(bucket, weights=wide, minlength=len(edges) - 1).astype(np.float64)
    counts = np.bincount(bucket, minlength=len(edges) - 1).astype(np.int64)
    scored = wide[window.scored_from - window.start - 1 :]
    return sums, counts, float(scored.sum()), losses[window.new_from - window.start - 1 :]


def _scores(
    windows: list[Window], edges: list[int], parts: list[Any], document_lengths: Sequence[int]
) -> Scores:
    parts = sorted(parts, key=lambda part: part[0])
    if [part[0] for part in parts] != list(range(len(windows))):
        raise RuntimeError("some windows were scored twice or not at all across the processes")
    offsets = np.concatenate([[0], np.cumsum([max(0, tokens - 1) for tokens in document_lengths])])
    token_losses = np.full(int(offsets[-1]), np.nan, dtype=np.float32)
    for (*_, new_losses), window in zip(parts, windows, strict=True):
        first = offsets[window.document] + window.new_from - 1
        token_losses[first : first + len(new_losses)] = new_losses
    return Scores(
        windows=windows,
        edges=edges,
        bucket_losses=np.stack([part[1] for part in parts]),
        bucket_tokens=np.stack([part[2] for part in parts]),
        losses=np.array([part[3] for part in parts]),
        tokens=np.array([window.scored for window in windows]),
        token_losses=token_losses,
    )


def _exp(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf

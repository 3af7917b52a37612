"""What the study measures on held-out books, with the package's own evaluators.

Perplexity: windows of the target length that do not overlap, the mean loss of every token in them
(the original's way with a stride of one window). Retrieval: how often the passkey of a window is
found, by the length of the window, and by how far back it stands in the longest.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch

from benchmarks.study.data import DIGITS, Books, passkey_test
from benchmarks.study.recall import FACTS, TOLD, recall_test
from benchmarks.study.settings import BASE_CONTEXT, Settings
from longlora_plugin.evaluation.perplexity import score_documents, token_losses

WINDOWS = {"books": 48, "retrieval": 48, "recall": 24}
"""Held-out windows of 2048 tokens a row is measured on, spread over the three books."""

QUICK_WINDOWS = 12
"""The same while a run goes on."""

RETRIEVAL_WINDOWS = 72
"""Windows of each length, spread over the three books."""

RECALL_WINDOWS = 72
"""The same for facts, four questions in each."""

SHORT_WINDOWS = 6
"""As many tokens as in so many windows of 2048, in windows of the base model's own context."""


def edges_of(target: int, original: int = 256) -> list[int]:
    """Bucket edges: the original context, and its doublings up to the target."""
    edges = [0, original]
    while edges[-1] < target:
        edges.append(min(2 * edges[-1], target))
    return edges


def all_of(model: Any, books: Books, settings: Settings, windows: int | None) -> dict[str, Any]:
    """Perplexity and, where passkeys were trained on, retrieval."""
    edges = edges_of(settings.target, BASE_CONTEXT[settings.task])
    found = perplexity(model, books, edges, windows or WINDOWS[settings.task])
    if settings.task == "retrieval":
        found["retrieval"] = retrieval(model, books, settings.target)
    if settings.task == "recall":
        found["recall"] = recall(model, books, edges)
        found["short"] = perplexity(model, books, edges[:2], SHORT_WINDOWS)
    return found


def perplexity(model: Any, books: Books, edges: list[int], windows: int) -> dict[str, Any]:
    """Over whole windows, and by position, with the model's own full attention."""
    target = edges[-1]
    held_out = books.held_out_windows(target, windows * 2048 // target)
    scores = score_documents(
        model,
        list(held_out.numpy()),
        length=target,
        stride=target,
        score="all",
        edges=edges,
    )
    return {
        "perplexity": scores.perplexity,
        "by_position": {f"{b['from']}-{b['to']}": b["perplexity"] for b in scores.buckets()},
        "tokens": int(scores.tokens.sum()),
    }


@torch.no_grad()
def perplexity_in_this_mode(model: Any, books: Books, settings: Settings) -> dict[str, Any]:
    """As `perplexity`, in the mode the model is in: with sparse attention in training mode."""
    held_out = books.held_out_windows(
        settings.target, WINDOWS[settings.task] * 2048 // settings.target
    )
    losses = torch.cat([token_losses(model, window[None]) for window in held_out]).double()
    edges = edges_of(settings.target, BASE_CONTEXT[settings.task])
    by_position = {
        f"{low}-{high}": math.exp(losses[:, low:high].mean()) for low, high in pairwise(edges)
    }
    return {"perplexity": math.exp(losses.mean()), "by_position": by_position}


@torch.no_grad()
def retrieval(model: Any, books: Books, target: int) -> dict[str, Any]:
    """Share of the passkeys, and of their digits, that is found in windows of each length."""
    model.eval()
    generator = torch.Generator().manual_seed(1234)
    found: dict[str, Any] = {"exact": {}, "digits": {}}
    for length in edges_of(target)[1:]:
        windows = books.held_out_windows(length, RETRIEVAL_WINDOWS)
        ids, keys, starts = passkey_test(windows, books.alphabet, generator)
        right = torch.cat([_answers(model, window[None]) for window in ids]) == keys
        found["exact"][length] = float(right.all(1).double().mean())
        found["digits"][length] = float(right.double().mean())
        if length == target:
            far = right[length - starts > target // 2].double()
            found |= {"far": float(far.mean()), "far_digits": far.numel()}
    return found


@torch.no_grad()
def recall(model: Any, books: Books, edges: list[int]) -> dict[str, Any]:
    """Share of the facts that are recalled in windows of the first and of the last length.

    `by_distance` is of the last length: by how far before its question a fact stands.
    """
    model.eval()
    generator = torch.Generator().manual_seed(1234)
    found: dict[str, Any] = {"within": {}, "by_distance": {}, "answers": {}}
    for length in (edges[1], edges[-1]):
        windows = books.held_out_windows(length, RECALL_WINDOWS)
        ids, values, distances = recall_test(windows, generator)
        right = torch.cat([_recalled(model, window[None]) for window in ids]) == values
        found["within"][length] = float(right.double().mean())
    for low, high in pairwise(edges):
        here = right[(distances > low) & (distances <= high)].double()
        if here.numel():
            found["by_distance"][f"{low}-{high}"] = float(here.mean())
            found["answers"][f"{low}-{high}"] = here.numel()
    return found


def _recalled(model: Any, ids: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=2 * FACTS // TOLD).logits
    return logits[:, ::2].argmax(-1)


def _answers(model: Any, ids: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=DIGITS).logits
    return logits.argmax(-1)

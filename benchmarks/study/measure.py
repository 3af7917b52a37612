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
from benchmarks.study.settings import ORIGINAL_CONTEXT, Settings
from longlora_plugin.evaluation.perplexity import score_documents, token_losses

WINDOWS = 48
"""Held-out windows of 2048 tokens a row is measured on, spread over the three books."""

QUICK_WINDOWS = 12
"""The same while a run goes on."""

RETRIEVAL_WINDOWS = 72
"""Windows of each length, spread over the three books."""


def edges_of(target: int) -> list[int]:
    """Bucket edges: the original context, and its doublings up to the target."""
    edges = [0, ORIGINAL_CONTEXT]
    while edges[-1] < target:
        edges.append(min(2 * edges[-1], target))
    return edges


def all_of(model: Any, books: Books, settings: Settings, windows: int | None) -> dict[str, Any]:
    """Perplexity and, where passkeys were trained on, retrieval."""
    found = perplexity(model, books, settings.target, windows or WINDOWS)
    if settings.task == "retrieval":
        found["retrieval"] = retrieval(model, books, settings.target)
    return found


def perplexity(model: Any, books: Books, target: int, windows: int = WINDOWS) -> dict[str, Any]:
    """Over whole windows, and by position, with the model's own full attention."""
    held_out = books.held_out_windows(target, windows * 2048 // target)
    scores = score_documents(
        model,
        list(held_out.numpy()),
        length=target,
        stride=target,
        score="all",
        edges=edges_of(target),
    )
    return {
        "perplexity": scores.perplexity,
        "by_position": {f"{b['from']}-{b['to']}": b["perplexity"] for b in scores.buckets()},
        "tokens": int(scores.tokens.sum()),
    }


@torch.no_grad()
def perplexity_in_this_mode(model: Any, books: Books, settings: Settings) -> dict[str, Any]:
    """As `perplexity`, in the mode the model is in: with sparse attention in training mode."""
    held_out = books.held_out_windows(settings.target, WINDOWS * 2048 // settings.target)
    losses = torch.cat([token_losses(model, window[None]) for window in held_out]).double()
    edges = edges_of(settings.target)
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


def _answers(model: Any, ids: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=DIGITS).logits
    return logits.argmax(-1)

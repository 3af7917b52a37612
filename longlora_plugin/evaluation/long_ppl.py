"""LongPPL: perplexity of the tokens that need a long context (arXiv 2410.23771, sections 2 and 3).

Most tokens are as easy with a short context as with a long one, so that plain perplexity hardly
sees the long one. A *key token* is one that an evaluator model predicts much better with the long
context than with a short one (gain above α nats) and predicts well with it (log-probability above
β nats). LongPPL is the perplexity of a model over the key tokens.

As in the authors' code: α = 2, β = −2, and the short context is K to 5/4·K tokens (K = 4096 there),
from windows that move by K/4. Here one model of the run is the evaluator for all of them, so that
every model is measured on the same tokens; the authors take a larger model.

Shapes: T scored tokens, in the order of `Scores.token_losses`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from longlora_plugin.evaluation.perplexity import bootstrap

GAIN = 2.0
"""α: least gain in log-probability from the long context, nats."""

LOG_PROBABILITY = -2.0
"""β: least log-probability with the long context, nats."""

SHORT_CONTEXT = 4096
"""K at most, tokens; half the original context where that is less."""

CLUSTER_TOKENS = 512
"""Neighbouring tokens that the confidence interval resamples together."""


@dataclass(frozen=True)
class KeyTokens:
    """How key tokens are found; see the module docstring."""

    short_context: int
    gain: float = GAIN
    log_probability: float = LOG_PROBABILITY

    @property
    def window(self) -> int:
        """Length of the windows with the short context, tokens."""
        return self.short_context + self.stride

    @property
    def stride(self) -> int:
        return max(1, self.short_context // 4)

    def mask(
        self, long_losses: NDArray[np.float32], short_losses: NDArray[np.float32]
    ) -> NDArray[np.bool_]:
        """Which tokens are key tokens, [T].

        Args:
            long_losses, short_losses: the evaluator's losses in nats, [T].
        """
        gains = short_losses - long_losses
        return (gains > self.gain) & (-long_losses > self.log_probability)


def default_short_context(base_context: int) -> int:
    """K for a model made for `base_context` tokens: inside what it has learned."""
    return max(2, min(SHORT_CONTEXT, base_context // 2))


def long_perplexity(losses: NDArray[np.float32], key: NDArray[np.bool_]) -> dict[str, object]:
    """LongPPL of a model from its losses [T] and the key tokens [T].

    Returns:
        `perplexity` (None without key tokens), `key_tokens`, `key_share`, and `ci95`.
    """
    count = int(key.sum())
    if not count:
        return {"perplexity": None, "key_tokens": 0, "key_share": 0.0, "ci95": None}
    wide = losses.astype(np.float64)
    clusters = np.flatnonzero(key) // CLUSTER_TOKENS
    interval = bootstrap(clusters, wide[key], np.ones(count, dtype=np.int64), over="stretches")
    return {
        "perplexity": float(np.exp(wide[key].mean())),
        "key_tokens": count,
        "key_share": count / len(key),
        "ci95": None if interval is None else [interval.low, interval.high],
    }

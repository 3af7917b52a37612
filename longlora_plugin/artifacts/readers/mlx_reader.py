"""MLX-LM (on a Mac, or `mlx-cpu`)."""

from importlib.metadata import version
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm import load
from protocol import answer_all


def score(folder: str, row: list[int]) -> dict[str, Any]:
    """Log-likelihoods of a row."""
    model, _ = load(folder)
    model.set_dtype(mx.float32)
    logits = model(mx.array([row]))[0].astype(mx.float32)
    chances = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    return {"scores": np.array(chances)[np.arange(len(row) - 1), row[1:]].tolist()}


if __name__ == "__main__":
    mx.set_default_device(mx.cpu)
    answer_all(version("mlx-lm"), score)

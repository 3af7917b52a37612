"""MLX-LM (on a Mac, or `mlx-cpu`)."""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm import load


def main() -> None:
    """Score one row."""
    mx.set_default_device(mx.cpu)
    folder, tokens, out = sys.argv[1:]
    row = json.loads(Path(tokens).read_text())
    model, _ = load(folder)
    model.set_dtype(mx.float32)
    logits = model(mx.array([row]))[0].astype(mx.float32)
    chances = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    scores = np.array(chances)[np.arange(len(row) - 1), row[1:]]
    answer = {"version": version("mlx-lm"), "scores": scores.tolist()}
    Path(out).write_text(json.dumps(answer))


if __name__ == "__main__":
    main()

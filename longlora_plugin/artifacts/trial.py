"""Score a row of tokens in other engines, and compare with transformers here."""

from __future__ import annotations

import json
import math
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

READERS = {
    "transformers-5": "transformers_reader.py",
    "transformers-4": "transformers_reader.py",
    "vllm": "vllm_reader.py",
    "mlx-lm": "mlx_reader.py",
    "llama.cpp": "llama_cpp_reader.py",
}
"""Engine → its script in `readers/`."""
EQUAL = 0.005
"""Largest relative difference of two perplexities that counts as none.

Kernels of fp32 differ by 1e-5, those of bf16 by some 1e-3; another RoPE by 0.02 and more."""


class EngineError(Exception):
    """An engine did not score the row; the message is what it said."""


def score(
    engine: str, python: str | Path, folder: Path, tokens: Sequence[int], *, timeout: float = 600
) -> dict[str, Any]:
    """Let an engine score a row.

    Args:
        engine: a name in `READERS`.
        python: the Python that has it installed.
        folder: of a whole model.
        tokens: ids of one row.
        timeout: in seconds.

    Returns:
        `version` of the engine, `scores`: nats for each token but the first, None for those that
        the engine did not tell.

    Raises:
        EngineError: it cannot load or run this model; says why.
    """
    script = Path(__file__).with_name("readers") / READERS[engine]
    with tempfile.TemporaryDirectory() as scratch:
        row, out = Path(scratch) / "tokens.json", Path(scratch) / "scores.json"
        row.write_text(json.dumps(list(tokens)))
        try:
            done = subprocess.run(
                [str(python), str(script), str(folder), str(row), str(out)],
                capture_output=True,
                text=True,
                errors="replace",
                timeout=timeout,
                env={**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"},
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise EngineError(f"no answer within {timeout:.0f} s") from None
        if done.returncode == 0 and out.is_file():
            answer: dict[str, Any] = json.loads(out.read_text())
            return answer
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line and "Failed core proc" not in line]
    raise EngineError((errors or lines or [f"exit code {done.returncode}"])[-1][:400])


def perplexity_ratio(
    scores: Sequence[float | None], reference: Sequence[float | None], first: int, last: int
) -> float:
    """Perplexity of `scores` over that of `reference`, at the tokens from `first` to `last` that
    both have; infinite where there are none or one of them is no number.
    """
    pairs = [
        (mine, theirs)
        for mine, theirs in zip(scores[first:last], reference[first:last], strict=True)
        if mine is not None and theirs is not None
    ]
    if not pairs or any(math.isnan(mine) for mine, _ in pairs):
        return math.inf
    return math.exp(sum(theirs - mine for mine, theirs in pairs) / len(pairs))


def is_equal(*ratios: float) -> bool:
    """Whether perplexities are the same to the precision of the engines."""
    return all(abs(ratio - 1) <= EQUAL for ratio in ratios)

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
TIMEOUT = 600
"""Seconds for each folder."""
EQUAL = 0.005
"""Largest relative difference of two perplexities that counts as none.

Kernels of fp32 differ by 1e-5, those of bf16 by some 1e-3; another RoPE by 0.02 and more."""
EQUAL_IN_TRANSFORMERS = 0.0005
"""The same for another version of transformers, which computes with the same kernels."""


def score_all(
    engine: str,
    python: str | Path,
    folders: Sequence[Path],
    tokens: Sequence[int],
) -> list[dict[str, Any]]:
    """Let an engine score a row with each of several models.

    Args:
        engine: a name in `READERS`.
        python: the Python that has it installed.
        folders: of whole models.
        tokens: ids of one row.

    Returns:
        For each folder `version` of the engine and `scores`: nats for each token but the first,
        None for those that the engine did not tell; or `error`.
    """
    script = Path(__file__).with_name("readers") / READERS[engine]
    with tempfile.TemporaryDirectory() as scratch:
        row = Path(scratch) / "tokens.json"
        row.write_text(json.dumps(list(tokens)))
        outs = [Path(scratch) / f"{index}.json" for index in range(len(folders))]
        pairs = [str(each) for pair in zip(folders, outs, strict=True) for each in pair]
        failure = f"no answer within {TIMEOUT} s"
        try:
            done = subprocess.run(
                [str(python), str(script), str(row), *pairs],
                capture_output=True,
                text=True,
                errors="replace",
                timeout=TIMEOUT * len(folders),
                env={**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"},
                check=False,
            )
            lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
            failure = ([line for line in lines if "Error" in line] or lines or ["it ended"])[-1]
        except subprocess.TimeoutExpired:
            pass
        return [
            json.loads(out.read_text())
            if out.is_file()
            else {"version": "", "error": failure[:400]}
            for out in outs
        ]


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


def is_equal(*ratios: float, engine: str = "") -> bool:
    """Whether perplexities are the same to the precision of the engine."""
    most = EQUAL_IN_TRANSFORMERS if engine.startswith("transformers") else EQUAL
    return all(abs(ratio - 1) <= most for ratio in ratios)

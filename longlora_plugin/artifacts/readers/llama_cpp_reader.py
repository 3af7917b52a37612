"""llama.cpp (`xllamacpp`), after its own converter to GGUF.

The server tells the chances of the next token only, so that each score is one request; a cached
prompt makes it one step. Two environment variables say how to convert: LONGLORA_GGUF_CONVERTER, the
path of llama.cpp's `convert_hf_to_gguf.py`, and LONGLORA_GGUF_PYTHON, a Python with torch,
transformers and gguf.
"""

import os
import subprocess
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import xllamacpp
from protocol import answer_all

EVERY = 16
"""Tokens from one score to the next."""

# Its list of tokenizers has not the test model's, whose text is not looked at: ids go in.
CONVERT = """
import runpy, sys
from pathlib import Path
script = Path(sys.argv[1])
sys.path[:0] = [str(script.parent), str(script.parent / "gguf-py")]
sys.argv = sys.argv[1:]
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
runpy.run_path(str(script), run_name="__main__")
"""


def score(folder: str, row: list[int]) -> dict[str, Any]:
    """Log-likelihoods of some of a row's tokens."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "model.gguf"
        done = subprocess.run(
            [
                *(os.environ["LONGLORA_GGUF_PYTHON"], "-c", CONVERT),
                *(os.environ["LONGLORA_GGUF_CONVERTER"], folder),
                *("--outfile", str(file), "--outtype", "f32"),
            ],
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"conversion: {done.stderr.strip().splitlines()[-1]}")
        return {"scores": score_file(str(file), row)}


def score_file(file: str, row: list[int]) -> list[float | None]:
    """Log-likelihoods of a row in a GGUF file, for some of its tokens."""
    params = xllamacpp.CommonParams()
    params.model.path = file
    params.n_ctx = len(row) + 16
    params.n_parallel = 1
    params.cpuparams.n_threads = 1
    params.warmup = False
    server = xllamacpp.Server(params)
    scores: list[float | None] = [None] * (len(row) - 1)
    for position in range(EVERY, len(row), EVERY):
        answer = server.handle_completions(
            {
                "prompt": row[:position],
                "n_predict": 1,
                "n_probs": 4096,
                "temperature": 1.0,
                "cache_prompt": True,
                "samplers": [],
            }
        )
        chances = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        found = [each["logprob"] for each in chances if each["id"] == row[position]]
        scores[position - 1] = found[0] if found else None
    return scores


if __name__ == "__main__":
    answer_all(version("xllamacpp"), score)

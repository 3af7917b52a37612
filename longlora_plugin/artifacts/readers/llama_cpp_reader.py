"""llama.cpp (`xllamacpp`), after its own converter to GGUF.

The server tells the chances of the next token only, so that each score is one request; a cached
prompt makes it one step. Two environment variables say how to convert: LONGLORA_GGUF_CONVERTER, the
path of llama.cpp's `convert_hf_to_gguf.py`, and LONGLORA_GGUF_PYTHON, a Python with torch,
transformers and gguf.
"""

import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import xllamacpp
from protocol import answer_all

EVERY = 16
"""Tokens from one score to the next."""

CONVERT = Path(__file__).with_name("convert_to_gguf.py")


def convert(folders: list[str], scratch: Path) -> dict[str, Path | str]:
    """Each folder's GGUF file, or why there is none."""
    files = {folder: scratch / f"{index}.gguf" for index, folder in enumerate(folders)}
    jobs = [
        argument
        for folder, file in files.items()
        for argument in (folder, "--outfile", str(file), "--outtype", "f32", "--")
    ]
    done = subprocess.run(
        [
            *(os.environ["LONGLORA_GGUF_PYTHON"], str(CONVERT)),
            *(os.environ["LONGLORA_GGUF_CONVERTER"], *jobs),
        ],
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    lines = done.stderr.strip().splitlines() or [""]
    return {
        folder: file
        if file.is_file()
        else next((line for line in lines if line.startswith(f"{folder}: ")), lines[-1])
        for folder, file in files.items()
    }


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
                # What it tells are chances before this; of half a character it tells none.
                "logit_bias": [[row[position], 1000.0]],
                "samplers": [],
            }
        )
        if "choices" not in answer:
            error = answer.get("error", answer)
            raise RuntimeError(str(error.get("message", error)))
        chances = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        found = [each["logprob"] for each in chances if each["id"] == row[position]]
        scores[position - 1] = found[0] if found else None
    return scores


def main() -> None:
    """Convert all folders, then score them."""
    with tempfile.TemporaryDirectory() as scratch:
        converted = convert(sys.argv[2::2], Path(scratch))

        def score(folder: str, row: list[int]) -> dict[str, Any]:
            file = converted[folder]
            if isinstance(file, str):
                raise RuntimeError(f"conversion: {file.removeprefix(f'{folder}: ')}")
            return {"scores": score_file(str(file), row)}

        answer_all(version("xllamacpp"), score)


if __name__ == "__main__":
    main()

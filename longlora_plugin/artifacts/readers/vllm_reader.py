"""vLLM: log-likelihoods of a prompt."""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import vllm
from vllm.engine.arg_utils import EngineArgs


def main() -> None:
    """Score one row."""
    folder, tokens, out = sys.argv[1:]
    row = json.loads(Path(tokens).read_text())
    served = EngineArgs(model=folder).create_model_config().max_model_len
    engine = vllm.LLM(folder, max_model_len=len(row) + 1, dtype="float32", enforce_eager=True)
    sampling = vllm.SamplingParams(max_tokens=1, prompt_logprobs=0)
    chances = engine.generate({"prompt_token_ids": row}, sampling)[0].prompt_logprobs[1:]
    scores = [each[token].logprob for token, each in zip(row[1:], chances, strict=True)]
    answer = {"version": vllm.__version__, "scores": scores, "served_context": served}
    Path(out).write_text(json.dumps(answer))


if __name__ == "__main__":
    main()

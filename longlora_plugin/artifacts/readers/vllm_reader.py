"""vLLM: log-likelihoods of a prompt."""

import os
from typing import Any

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # a process of its own costs 30 s
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import vllm
from protocol import answer_all
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory
from vllm.engine.arg_utils import EngineArgs


def score(folder: str, row: list[int]) -> dict[str, Any]:
    """Log-likelihoods of a row, and the context that vLLM takes by itself."""
    served = EngineArgs(model=folder).create_model_config().max_model_len
    try:
        engine = vllm.LLM(folder, max_model_len=len(row) + 1, dtype="float32", enforce_eager=True)
        sampling = vllm.SamplingParams(max_tokens=1, prompt_logprobs=0)
        chances = engine.generate({"prompt_token_ids": row}, sampling)[0].prompt_logprobs[1:]
        scores = [each[token].logprob for token, each in zip(row[1:], chances, strict=True)]
        return {"scores": scores, "served_context": served}
    finally:
        engine = None
        cleanup_dist_env_and_memory()


if __name__ == "__main__":
    answer_all(vllm.__version__, score)

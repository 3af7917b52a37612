"""Candidate answers are scored with a KV cache as whole passes without one would."""

import pytest
import torch
from evaluation_models import random_mistral, write_tiny_llama
from transformers import AutoTokenizer, LlamaForCausalLM

from benchmarks.experiments.longqa.likelihood import log_likelihoods


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_tiny_llama(tmp_path_factory.mktemp("likelihood") / "base")


@pytest.fixture(scope="module")
def tokenizer(base):
    return AutoTokenizer.from_pretrained(base)


@pytest.fixture(scope="module", params=["llama", "mistral, sliding window"])
def cached_model(request, base, tokenizer):
    if request.param == "llama":
        return LlamaForCausalLM.from_pretrained(base).eval()
    return random_mistral(len(tokenizer))


def test_likelihoods_equal_whole_passes_without_cache_or_padding(cached_model, tokenizer):
    def tokens(count, seed):
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(3, 250, (count,), generator=generator).tolist()

    prompts = [tokens(length, seed) for seed, length in enumerate([300, 260, 333])]
    candidates = [[tokens(length, 10 + length) for length in (1, 3, 5)] for _ in prompts]
    found = log_likelihoods(cached_model, tokenizer, prompts, candidates)
    for prompt, answers, scores in zip(prompts, candidates, found, strict=True):
        for answer, score in zip(answers, scores, strict=True):
            ids = torch.tensor([prompt + answer])
            with torch.no_grad():
                logs = cached_model(ids).logits.log_softmax(-1)[0, :-1]
            expected = logs.gather(1, ids[0, 1:, None])[-len(answer) :].sum().item()
            assert score == pytest.approx(expected, rel=1e-4, abs=1e-4)

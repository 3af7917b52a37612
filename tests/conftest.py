"""Tiny models that tests share: random Llamas with a byte-level tokenizer, made once a session."""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("AXOLOTL_DO_NOT_TRACK", "1")

import pytest
import torch
from hypothesis import settings

# In CI the same examples each time: a rare one that fails is found by the runs that draw anew.
settings.register_profile("ci", derandomize=True, deadline=None)
if os.environ.get("CI"):
    settings.load_profile("ci")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device; torch.cuda.is_available() is False")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(autouse=True, scope="module")
def no_model_stays_enabled():
    """Models that a file's tests left with shifted attention must not reach the next file."""
    yield
    registries = sys.modules.get("longlora_plugin.attention.registries")
    for handle in registries.enabled() if registries else ():
        handle.remove()


@pytest.fixture(scope="session")
def tiny_text() -> str:
    """A few thousand words with some structure, the same in every run."""
    generator = random.Random(0)
    words = [f"{a}{b}" for a in ("ka", "lo", "mi", "ru", "te") for b in ("n", "sa", "ri", "do")]
    return " ".join(generator.choice(words) for _ in range(6000))


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_text: str):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([tiny_text], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer):
    """Function (name, **config) → folder of a random 2-layer Llama for 64 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    root = tmp_path_factory.mktemp("models")

    def make(name: str, **overrides: object) -> Path:
        folder = root / name
        if folder.exists():
            return folder
        torch.manual_seed(0)
        config = LlamaConfig(
            **{
                "vocab_size": len(tiny_tokenizer),
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 64,
                "bos_token_id": 0,
                "eos_token_id": 1,
                "pad_token_id": 2,
                **overrides,
            }
        )
        LlamaForCausalLM(config).save_pretrained(folder)
        tiny_tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory: pytest.TempPathFactory, tiny_text: str) -> Path:
    """A completion dataset of 30 documents."""
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    size = len(tiny_text) // 30
    rows = [tiny_text[i * size : (i + 1) * size] for i in range(30)]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return path

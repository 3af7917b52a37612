"""The base models that the study extends: the bundled one, and one that finds passkeys.

Real base models can look something up within their context. The bundled one has never been asked
to, so for the retrieval rows it first goes on training, every weight, at its old context of 256, on
windows with passkeys that grow from 32 tokens to 256. Then it is extended like the other, and the
question is whether what it can do at 256 tokens it can do at 2048.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from benchmarks.study.data import Books, book_batches, plant

STAGES = ((32, 60), (64, 40), (128, 40), (256, 80))
"""(tokens of a window, steps), one after the other."""

TOKENS_A_STEP = 4096
LEARNING_RATE = 1e-3
LINEAR_END = 60
"""Steps over which the rate falls to 0 at the end."""


def retrieval_base(bundled: Path, out: Path, books: Books) -> Path:
    """Folder of the base model that finds passkeys, made first where it is not there."""
    folder = out / "base-retrieval"
    if not (folder / "config.json").is_file():
        model = _train(bundled, books)
        part = out / "base-retrieval.part"
        model.save_pretrained(part)
        part.rename(folder)
    return folder


def _train(bundled: Path, books: Books) -> Any:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(bundled, attn_implementation="sdpa")
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0
    )
    lengths = [length for length, steps in STAGES for _ in range(steps)]
    batches = {
        length: book_batches(books.train, length, TOKENS_A_STEP // length, seed=0)
        for length in set(lengths)
    }
    generator = torch.Generator().manual_seed(0)
    for step, length in enumerate(lengths):
        rate = min(1.0, (step + 1) / 20, (len(lengths) - step) / LINEAR_END)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * rate
        ids, labels = plant(next(batches[length]), books.alphabet, generator)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()

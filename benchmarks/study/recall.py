"""×32 from 64 tokens: a base model, and rows whose answers need far context.

Text is read byte by byte. A *fact* is one of `NAMES` × `VALUES` further tokens, somewhere in the
text: it says which value a name has. Later the name's own token asks for it, and the model shall
say the value, which only the label has: it has to be looked up where the fact is written. A window
holds `FACTS` of them, of different names, so that it is not enough to find *a* fact.

The base model is pre-trained from nothing at `CONTEXT` tokens, half on books and half on windows
with facts, so that it looks facts up within its context as real base models do.

Shapes: B windows a batch, N tokens a window, W windows.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.study.data import IGNORED, Books, book_batches

CONTEXT = 64
FACTS, NAMES, VALUES = 8, 16, 8
TOLD = 2
"""Times that a window says something of a name; the last time counts."""

FIRST_FACT, FIRST_NAME = 128, 256
"""Tokens: 128 ASCII characters, 128 facts, 16 names; an answer is the fact that was asked for."""

FILLER = ord(" ")
TOKENS_A_QUESTION = 8
"""A window of N tokens asks N / 8 times for a value."""

SHAPE = {
    "vocab_size": 272,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.05,
    "tie_word_embeddings": True,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
STAGES = ((1, 900, 4e-3, 500), (TOLD, 200, 2e-3, 150))
"""(times that a window says something of a name, steps, rate, steps over which it falls to 0)."""

TOKENS_A_STEP, WARMUP_STEPS = 2048, 50


def read_books(text_dir: Path) -> Books:
    """The books as ASCII bytes, so that names and values are free."""

    def read(name: str) -> list[Tensor]:
        lines = (text_dir / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        texts = [json.loads(line)["text"].encode("ascii", "ignore") for line in lines]
        return [torch.tensor(list(text)) for text in texts]

    return Books(read("train"), read("heldout"))


def draw(told: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The facts of a window in their order, [FACTS]: whose, 0 … NAMES − 1, and their tokens."""
    names = torch.randperm(NAMES, generator=generator)[: FACTS // told].repeat(told)
    names = names[torch.randperm(FACTS, generator=generator)]
    values = torch.randint(VALUES, (FACTS,), generator=generator)
    return names, FIRST_FACT + VALUES * names + values


def last_of(names: Tensor, known: Tensor, which: Tensor) -> Tensor:
    """Of the first `known` [Q] of the facts, the last one of the name of fact `which` [Q]."""
    order = torch.arange(FACTS)
    same = (names == names[which][:, None]) & (order < known[:, None])
    return torch.where(same, order, -1).amax(1)


def plant(windows: Tensor, generator: torch.Generator, told: int = TOLD) -> tuple[Tensor, Tensor]:
    """Facts in each of `windows` [W, N], asked for at random places after them.

    Returns:
        ids [W, N] and labels [W, N]: the token itself, `IGNORED` where it is random, and after a
        name the fact that counts, whatever token stands there.
    """
    ids, labels = windows.clone(), windows.clone()
    count = FACTS + windows.shape[1] // TOKENS_A_QUESTION
    for row in range(len(windows)):
        names, facts = draw(told, generator)
        # Every second token at most, so that a name never stands where an answer is due.
        slots = torch.randperm((windows.shape[1] - 1) // 2, generator=generator)[:count]
        places = 1 + 2 * slots.sort().values
        written = torch.zeros(count, dtype=torch.bool)
        written[torch.randperm(count - 1, generator=generator)[: FACTS - 1] + 1] = True
        written[0] = True
        asked = places[~written]
        known = written.cumsum(0)[~written]  # facts that stand before a question
        which = (torch.rand(len(asked), generator=generator) * known).long()
        ids[row, places[written]], labels[row, places[written]] = facts, IGNORED
        ids[row, asked], labels[row, asked] = FIRST_NAME + names[which], IGNORED
        labels[row, asked + 1] = facts[last_of(names, known, which)]
    return ids, labels


def recall_test(
    windows: Tensor, generator: torch.Generator, told: int = TOLD
) -> tuple[Tensor, Tensor, Tensor]:
    """Windows [W, N] with a fact in each eighth, and each name asked for at the end.

    Returns:
        ids [W, N], whose last 2 · Q tokens are a name, a filler, a name, …; the facts that are
        asked for [W, Q = FACTS / told]; how far before its question each stands [W, Q].
    """
    ids = windows.clone()
    questions = FACTS // told
    end = windows.shape[1] - 2 * questions
    stride = end // FACTS
    asked = end + 2 * torch.arange(questions)
    ids[:, end:] = FILLER
    answers, distances = [], []
    for row in range(len(windows)):
        names, facts = draw(told, generator)
        places = stride * torch.arange(FACTS)
        places = places + torch.randint(stride, (FACTS,), generator=generator)
        every = torch.full((FACTS,), FACTS)
        last = last_of(names, every, torch.arange(FACTS)).unique()
        last = last[torch.randperm(questions, generator=generator)]
        ids[row, places], ids[row, asked] = facts, FIRST_NAME + names[last]
        answers.append(facts[last])
        distances.append(asked - places[last])
    return ids, torch.stack(answers), torch.stack(distances)


def recall_base(out: Path, books: Books) -> Path:
    """Folder of the base model, pre-trained first where it is not there."""
    folder = out / "base-recall"
    if not (folder / "config.json").is_file():
        model = pretrain(books)
        part = out / "base-recall.part"
        model.save_pretrained(part)
        part.rename(folder)
    return folder


def pretrain(books: Books) -> Any:
    """A Llama of 0.8 million parameters, in fp32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, max_position_embeddings=CONTEXT)).train()
    for seed, stage in enumerate(STAGES):
        train_stage(model, books, *stage, seed=seed)
    return model.eval()


def train_stage(
    model: Any, books: Books, told: int, steps: int, rate: float, decay: int, seed: int
) -> None:
    """Train every weight, one row of a batch after the other with facts and without."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    norms = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
    )
    batches = book_batches(books.train, CONTEXT, TOKENS_A_STEP // CONTEXT, seed)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        now = min(1.0, (step + 1) / WARMUP_STEPS, (steps - step) / decay)
        for group in optimizer.param_groups:
            group["lr"] = rate * now
        ids = next(batches)
        asked, answers = plant(ids[::2], generator, told)
        loss = model(
            input_ids=torch.cat([asked, ids[1::2]]),
            labels=torch.cat([answers, ids[1::2]]),
            use_cache=False,
        ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

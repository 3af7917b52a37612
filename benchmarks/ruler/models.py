"""Models made by hand whose answers are known: one copies, one finds RULER's needles."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast


class CopyConfig(PreTrainedConfig):
    model_type = "copy-model"
    num_hidden_layers = 0


class CopyModel(PreTrainedModel, GenerationMixin):
    """Predicts what followed the longest earlier match of its last tokens: it can only copy.

    `reach` limits how many tokens back it looks, as a model of a short context would.
    """

    config_class = CopyConfig

    def __init__(self, vocab_size, reach=None):
        super().__init__(CopyConfig(vocab_size=vocab_size))
        self.anchor = torch.nn.Parameter(torch.zeros(1))
        self.reach = reach

    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        return {"input_ids": input_ids, "use_cache": False}

    def forward(self, input_ids, attention_mask=None, **kwargs):
        logits = torch.zeros(len(input_ids), 1, self.config.vocab_size)
        for row, ids in enumerate(input_ids.tolist()):
            logits[row, 0, self.follower(ids)] = 50.0
        return CausalLMOutputWithPast(logits=logits)

    def follower(self, ids):
        first = 0 if self.reach is None else max(0, len(ids) - self.reach)
        best, follower = 0, ids[-1]
        for place in range(first + 1, len(ids)):
            match = 0
            while match < place - first and ids[place - 1 - match] == ids[-1 - match]:
                match += 1
            if match > best:
                best, follower = match, ids[place]
        return follower


class Retriever(CopyModel):
    """Answers RULER's needle questions with what the tokens it sees say of the key, and stops.

    Args:
        reach: how many tokens back it sees; None: all.
    """

    def __init__(self, tokenizer: Any, reach: int | None = None) -> None:
        super().__init__(len(tokenizer), reach)
        self.tokenizer = tokenizer
        self.knows: Callable[[str], bool] = lambda key: True

    def follower(self, ids: list[int]) -> int:
        text = self.tokenizer.decode(ids)
        if text.endswith("provided text is"):
            self.start = len(ids)
        seen = text if self.reach is None else self.tokenizer.decode(ids[-self.reach :])
        key = re.search(r"magic \w+ for (\S+) mentioned in the provided text is", text)[1]
        found = re.search(rf"for {re.escape(key)} is: (\S+)\.", seen) if self.knows(key) else None
        said = f" {found[1]}" if found else ""
        answer = [*self.tokenizer(said)["input_ids"], self.tokenizer.eos_token_id]
        return answer[min(len(ids) - self.start, len(answer) - 1)]

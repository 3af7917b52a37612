"""Log-likelihoods of several answers to one prompt: the prompt is read once.

Shapes: B prompts, P tokens of the longest (left-padded), C candidates, A tokens of the longest.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.experiments.longqa.questions import Ids


@torch.inference_mode()
def log_likelihoods(
    model: Any, tokenizer: Any, prompts: Sequence[Ids], candidates: Sequence[list[Ids]]
) -> list[list[float]]:
    """Log-likelihood in nats of each prompt's candidate answers, [B][C]."""
    ids, mask = _left_padded(tokenizer, prompts)
    places = (mask.cumsum(1) - 1).clamp_min(0)
    read = model(
        input_ids=ids, attention_mask=mask, position_ids=places, use_cache=True, logits_to_keep=1
    )
    first_BV = read.logits[:, -1].float().log_softmax(-1)
    following = places[:, -1:] + 1
    scores = []
    for index in range(len(candidates[0])):
        answers = [each[index] for each in candidates]
        total_B = first_BV.gather(1, torch.tensor([[a[0]] for a in answers]))[:, 0]
        if (longest := max(map(len, answers))) > 1:
            fill = answers[0][0]
            answer_BA = torch.tensor(
                [answer + [fill] * (longest - len(answer)) for answer in answers]
            )
            # Only the last tokens are padding, and only their own predictions see them.
            real_BA = torch.tensor(
                [[i < len(answer) for i in range(longest)] for answer in answers]
            )
            cache, roll_back = _reusable(read.past_key_values, longest - 1)
            more = model(
                input_ids=answer_BA[:, :-1],
                attention_mask=torch.cat([mask, torch.ones_like(answer_BA[:, :-1])], 1),
                position_ids=following + torch.arange(longest - 1),
                past_key_values=cache,
                use_cache=True,
            )
            roll_back()
            log_BA = more.logits.float().log_softmax(-1)
            log_BA = log_BA.gather(2, answer_BA[:, 1:, None])[..., 0]
            total_B = total_B + (log_BA * real_BA[:, 1:]).sum(1)
        scores.append(total_B)
    found: list[list[float]] = torch.stack(scores, 1).tolist()
    return found


def _reusable(cache: Any, added: int) -> tuple[Any, Callable[[], None]]:
    """A cache that may be written to, and what takes the `added` tokens away again.

    A sliding-window or recurrent cache forgets what it drops, so that one is copied.
    """
    sliding = getattr(cache, "is_sliding", None)
    if isinstance(sliding, list) and not any(sliding) and _is_plain(cache):
        return cache, lambda: cache.crop(-added)
    return copy.deepcopy(cache), lambda: None


def _is_plain(cache: Any) -> bool:
    from transformers import DynamicCache

    return type(cache) is DynamicCache and not any(getattr(cache, "is_linear", []) or [])


def _left_padded(tokenizer: Any, prompts: Sequence[Ids]) -> tuple[Tensor, Tensor]:
    """Prompts as ids [B, P] and mask [B, P]; padding stands before a prompt."""
    batch = tokenizer.pad({"input_ids": list(prompts)}, padding_side="left", return_tensors="pt")
    return batch["input_ids"], batch["attention_mask"]

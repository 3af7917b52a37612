"""transformers, any version."""

from typing import Any

import torch
import transformers
from protocol import answer_all


def score(folder: str, row: list[int]) -> dict[str, Any]:
    """Log-likelihoods of a row."""
    transformers.AutoTokenizer.from_pretrained(folder)  # a server needs it too
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32)
    with torch.no_grad():
        logits = model.eval()(torch.tensor([row])).logits[0].double()
    scores = logits[:-1].log_softmax(-1).gather(1, torch.tensor(row[1:])[:, None])[:, 0]
    return {"scores": scores.tolist()}


if __name__ == "__main__":
    answer_all(transformers.__version__, score)

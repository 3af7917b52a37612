"""transformers, any version."""

import json
import sys
from pathlib import Path

import torch
import transformers


def main() -> None:
    """Score one row."""
    folder, tokens, out = sys.argv[1:]
    row = json.loads(Path(tokens).read_text())
    transformers.AutoTokenizer.from_pretrained(folder)  # a server needs it too
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32)
    with torch.no_grad():
        logits = model.eval()(torch.tensor([row])).logits[0].double()
    scores = logits[:-1].log_softmax(-1).gather(1, torch.tensor(row[1:])[:, None])[:, 0]
    answer = {"version": transformers.__version__, "scores": scores.tolist()}
    Path(out).write_text(json.dumps(answer))


if __name__ == "__main__":
    main()

"""How a row is phrased: the document, then a question about it, for each kind of document.

LongAlpaca's rows have two keys, `instruction` and `output`; the chat layout says the same as
`messages`. Both load with Axolotl's own dataset types (`alpaca`, `chat_template`).
"""

from __future__ import annotations

import random
from typing import Any

LAYOUTS = ("alpaca", "chat")

FRAMES: dict[str, tuple[str, ...]] = {
    "paper": (
        "Here is a research paper. Read all of it; a question follows at the end.\n\n"
        "{document}\n\nThat was the paper. Answer this about it: {question}",
        "I am going to show you a scientific article, then ask you something that it answers.\n\n"
        "=== article ===\n{document}\n=== end of article ===\n\n{question}",
        "Study the following paper closely.\n\n<paper>\n{document}\n</paper>\n\n"
        "Using nothing but the paper, respond to this: {question}",
        "{document}\n\n---\nThe text above comes from an academic paper. {question}",
    ),
    "book": (
        "What follows is taken from a book. Read it to the end, then answer my question.\n\n"
        "{document}\n\nThe excerpt stops here. My question: {question}",
        "Read these pages of a book with care; you will be asked about a detail of them.\n\n"
        "=== book ===\n{document}\n=== end of excerpt ===\n\n{question}",
        "<book>\n{document}\n</book>\n\n"
        "You have just read part of a book. Going by these pages alone: {question}",
        "Let us talk about a book. This is the passage I have in mind:\n\n{document}\n\n"
        "Now tell me: {question}",
    ),
    "report": (
        "Below you find a report. A question about what it says comes after it.\n\n"
        "{document}\n\nEnd of the report. Question: {question}",
        "Please go through this document and then answer from it.\n\n"
        "=== document ===\n{document}\n=== end of document ===\n\n{question}",
        "<report>\n{document}\n</report>\n\n"
        "The answer to the next question stands in the report above. {question}",
        "I need something looked up in the following text:\n\n{document}\n\n{question}",
    ),
}

# What Axolotl's own `type: alpaca` puts around a row; it counts towards the context.
_ALPACA_PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)
_CHAT_FALLBACK = (
    "<|im_start|>user\n{instruction}<|im_end|>\n<|im_start|>assistant\n{output}<|im_end|>\n"
)

SPECIAL_TOKENS = 2
"""Tokens that training adds to a row's text: one at the start, one at the end."""


def phrase(kind: str, document: str, question: str, rng: random.Random) -> str:
    """One instruction: `document`, then `question`, in a wording for `kind`."""
    frame = rng.choice(FRAMES[kind])
    before, _, rest = frame.partition("{document}")
    between, _, after = rest.partition("{question}")
    return f"{before}{document}{between}{question}{after}"


def frame_texts(kind: str) -> list[str]:
    """The wordings of `kind` without document and question, for measuring."""
    return [frame.format(document="", question="") for frame in FRAMES[kind]]


def as_row(layout: str, instruction: str, output: str) -> dict[str, Any]:
    """One row of the data file in `layout` (one of LAYOUTS)."""
    if layout == "alpaca":
        return {"instruction": instruction, "output": output}
    return {
        "messages": [
            {"role": "user", "content": instruction},
            {"role": "assistant", "content": output},
        ]
    }


def row_texts(row: Any) -> tuple[str, str]:
    """What a row asks and what it answers, in either layout.

    Raises:
        ValueError: the row is in neither layout.
    """
    if not isinstance(row, dict):
        raise ValueError(f"is {row!r:.60}, not an object")
    turns = row.get("messages")
    if (
        isinstance(turns, list)
        and len(turns) >= 2
        and all(isinstance(turn, dict) and isinstance(turn.get("content"), str) for turn in turns)
    ):
        asked_in_turns = [turn["content"] for turn in turns[:-1]]
        return "\n\n".join(asked_in_turns), turns[-1]["content"]
    asked, answered = row.get("instruction"), row.get("output")
    if not isinstance(asked, str) or not isinstance(answered, str):
        raise ValueError(
            f"has the keys {sorted(row)}; expected `instruction` and `output`, or `messages`"
        )
    extra = row.get("input")
    return (f"{asked}\n\n{extra}" if extra else asked), answered


def as_trained(layout: str, instruction: str, output: str, tokenizer: Any = None) -> str:
    """The text that a training run tokenizes for a row, near enough to count its tokens."""
    if layout == "alpaca":
        return _ALPACA_PROMPT.replace("{instruction}", instruction, 1) + output
    if getattr(tokenizer, "chat_template", None):
        turns = as_row("chat", instruction, output)["messages"]
        rendered: str = tokenizer.apply_chat_template(turns, tokenize=False)
        return rendered
    before, _, rest = _CHAT_FALLBACK.partition("{instruction}")
    between, _, after = rest.partition("{output}")
    return f"{before}{instruction}{between}{output}{after}"

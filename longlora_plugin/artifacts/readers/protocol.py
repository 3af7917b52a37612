"""What all readers share: the arguments, and an answer for each folder."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def answer_all(version: str, score: Callable[[str, list[int]], dict[str, Any]]) -> None:
    """Score each folder of the command line.

    Args:
        version: of the engine.
        score: function (folder, row of tokens) → `scores` and what else the engine tells.
    """
    tokens, *pairs = sys.argv[1:]
    row = json.loads(Path(tokens).read_text())
    for folder, out in zip(pairs[::2], pairs[1::2], strict=True):
        try:
            answer = {"version": version, **score(folder, row)}
        except Exception as error:
            said = " ".join(str(error).split())
            answer = {"version": version, "error": f"{type(error).__name__}: {said}"[:400]}
        Path(out).write_text(json.dumps(answer))

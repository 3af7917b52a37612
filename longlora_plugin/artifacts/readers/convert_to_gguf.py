"""llama.cpp's converter for a tokenizer that is not in its list: one with GPT-2's way of splitting.

    python convert_to_gguf.py LLAMA.CPP/convert_hf_to_gguf.py FOLDER --outfile MODEL.gguf

It knows a tokenizer by a digest of what it makes of a text, so that of a vocabulary of one's own,
like the quickstart's, it says "BPE pre-tokenizer was not recognized". Known ones stay as they are.
After `--` comes another FOLDER with its options: the second one takes a second, not ten.
"""

import importlib
import itertools
import runpy
import sys
from pathlib import Path
from typing import Any


def convert_all(script: str, arguments: list[str]) -> bool:
    """Convert each folder; whether all went well. An error names its folder."""
    sys.path[:0] = [str(Path(script).parent), str(Path(script).parent / "gguf-py")]
    model = importlib.import_module("conversion.base").TextModel
    known = model.get_vocab_base_pre

    def get_vocab_base_pre(self: Any, tokenizer: Any) -> Any:
        try:
            return known(self, tokenizer)
        except NotImplementedError:
            return "gpt-2"

    model.get_vocab_base_pre = get_vocab_base_pre
    good = True
    for separates, each in itertools.groupby(arguments, lambda argument: argument == "--"):
        if not separates:
            sys.argv = [script, *each]
            try:
                runpy.run_path(script, run_name="__main__")
            except Exception as error:
                good = False
                print(f"{sys.argv[1]}: {type(error).__name__}: {error}", file=sys.stderr)
    return good


if __name__ == "__main__":
    sys.exit(not convert_all(sys.argv[1], sys.argv[2:]))

"""The tokenizer's class in a saved folder, by a name that every reader knows.

transformers 5 writes `TokenizersBackend`, which transformers 4 does not have ("Tokenizer class
TokenizersBackend does not exist"); llama.cpp's converter uses transformers 4. Both know
`PreTrainedTokenizerFast`.
"""

from __future__ import annotations

from pathlib import Path

from longlora_plugin.checkpoints.files import read_json, write_json

NEW, OLD = "TokenizersBackend", "PreTrainedTokenizerFast"


def name_for_older_readers(folder: Path) -> bool:
    """Write the older class name into a folder's `tokenizer_config.json`; whether it changed."""
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return False
    content = read_json(path)
    if content.get("tokenizer_class") != NEW:
        return False
    write_json(path, {**content, "tokenizer_class": OLD})
    return True

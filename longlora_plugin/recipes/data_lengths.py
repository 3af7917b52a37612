"""How long the documents of a recipe's data are, told before a run: from prepared or local data.

Local rows are measured by their text, without the words of a chat template: the longest ones, which
decide, by the tokenizer, the others by their characters. The run itself reports exact lengths.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from longlora_plugin.run.document_lengths import DocumentLengths, lengths_in
from longlora_plugin.run.recipe import sequence_len_of

ROWS = 200_000
"""Rows of each dataset that are read."""
TOKENIZED = 100
"""How many rows, from the beginning and of the longest, are given to the tokenizer."""
FIELDS = ("text", "instruction", "input", "output", "messages", "conversations", "prompt")
"""Where the text of a row is, in the layouts most used; in others, every text counts."""
READERS = {
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
}
"""Suffix → how `datasets` reads it; the values are Axolotl's `ds_type`."""


def document_lengths(
    raw: Mapping[str, Any], base_context: int
) -> tuple[DocumentLengths, str] | None:
    """Lengths of the documents of a recipe's data, and where they were read.

    Returns:
        None where the data, or the tokenizer, is not on this machine.
    """
    lengths: list[int] = []
    sources: list[str] = []
    for entry in raw.get("datasets") or []:
        files = _local_files(entry) if isinstance(entry, Mapping) else []
        found = _lengths_of_files(raw, entry, files) if files else None
        if found is None:
            return _prepared(raw, base_context)
        lengths += found
        sources.append(str(entry["path"]))
    if not sources:
        return _prepared(raw, base_context)
    measured = DocumentLengths.of(lengths, base_context, sequence_len_of(raw))
    return measured, f"{', '.join(sources)}, by their text"


def missing_files(raw: Mapping[str, Any]) -> list[str]:
    """A line for each data file that a recipe names and that does not exist."""
    missing = []
    for section in ("datasets", "test_datasets"):
        rows = raw.get(section)
        for index, entry in enumerate(rows if isinstance(rows, list) else []):
            # Files of a dataset of the hub are not looked for.
            if not isinstance(entry, Mapping) or entry.get("data_files"):
                continue
            name = str(entry.get("path"))
            is_file = Path(name).suffix in READERS or name.startswith((".", "/", "~"))
            if is_file and not Path(name).expanduser().exists():
                missing.append(f"{section}.{index}: no file {name} (looked for in {Path.cwd()})")
    return missing


def _local_files(entry: Mapping[str, Any]) -> list[Path]:
    given = entry.get("data_files") or entry.get("path") or ""
    paths = [
        Path(str(each)).expanduser() for each in (given if isinstance(given, list) else [given])
    ]
    if entry.get("data_files") and entry.get("path"):
        under = Path(str(entry["path"])).expanduser()
        paths = [path if path.exists() else under / path for path in paths]
    files: list[Path] = []
    for path in paths:
        files += sorted(path.rglob("*")) if path.is_dir() else [path]
    known = [path for path in files if path.is_file() and path.suffix in READERS]
    # A dataset that was saved to a folder has its description, in JSON, next to its rows.
    return [path for path in known if path.suffix == known[0].suffix]


def _lengths_of_files(
    raw: Mapping[str, Any], entry: Mapping[str, Any], files: list[Path]
) -> list[int] | None:
    import datasets
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(raw.get("tokenizer_config") or raw["base_model"]),
            trust_remote_code=raw.get("trust_remote_code") is True,
        )
        reader = READERS[files[0].suffix]
        rows = datasets.load_dataset(
            reader, data_files=[str(path) for path in files], split="train", streaming=True
        )
        texts = (_text_of(row, entry) for row in islice(rows, ROWS))
        lengths = lengths_of_texts(
            texts, lambda text: len(tokenizer(text, verbose=False).input_ids)
        )
    except Exception:
        return None  # no tokenizer here, or no file that this can read: Axolotl will say it
    kind, target = entry.get("type"), sequence_len_of(raw)
    if kind == "completion" or (isinstance(kind, Mapping) and kind.get("type") == "completion"):
        return [part for length in lengths for part in _split(length, target)]
    if raw.get("excess_length_strategy") == "truncate":
        return [min(length, target) for length in lengths]
    return [length for length in lengths if length <= target]


def lengths_of_texts(texts: Iterable[str], count: Callable[[str], int]) -> list[int]:
    """Tokens of each text; only the first ones and the longest ones are counted by `count`."""
    characters: list[int] = []
    exact: dict[int, int] = {}
    longest: list[tuple[int, int, str]] = []
    for index, text in enumerate(texts):
        characters.append(len(text))
        if index < TOKENIZED:
            exact[index] = count(text)
        elif len(longest) < TOKENIZED:
            heapq.heappush(longest, (len(text), index, text))
        else:
            heapq.heappushpop(longest, (len(text), index, text))
    exact |= {index: count(text) for _, index, text in longest}
    a_character = sum(exact.values()) / max(1, sum(characters[index] for index in exact))
    return [
        exact.get(index, round(number * a_character)) for index, number in enumerate(characters)
    ]


def _split(length: int, target: int) -> Iterator[int]:
    """Axolotl cuts a text for completion into rows of `sequence_len`."""
    for start in range(0, length, target):
        yield min(target, length - start)


def _text_of(row: Mapping[str, Any], entry: Mapping[str, Any]) -> str:
    names = (*(str(entry.get(key)) for key in ("field", "field_messages")), *FIELDS)
    return " ".join(_strings([row[name] for name in names if name in row] or list(row.values())))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _strings(each)
    elif isinstance(value, list):
        for each in value:
            yield from _strings(each)


def _prepared(raw: Mapping[str, Any], base_context: int) -> tuple[DocumentLengths, str] | None:
    """The newest dataset in `dataset_prepared_path`, whose lengths are exact."""
    import datasets

    folder = Path(str(raw.get("dataset_prepared_path") or "last_run_prepared"))
    sets = sorted(folder.glob("*/dataset_info.json"), key=lambda path: path.stat().st_mtime)
    if not sets:
        return None
    lengths = lengths_in(datasets.load_from_disk(str(sets[-1].parent)))
    if lengths is None:
        return None
    return DocumentLengths.of(lengths, base_context, sequence_len_of(raw)), str(sets[-1].parent)

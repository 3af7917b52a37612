"""Text to evaluate on: files, folders and Hugging Face datasets as documents of token ids.

Documents stay apart all the way: a window never reads two of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

TEXT_SUFFIXES = (".txt", ".md", ".text")
JSON_LINES_SUFFIXES = (".jsonl", ".ndjson")
SPLITS = ("test", "validation", "train")
"""Splits of a dataset in the order in which they are looked for."""


@dataclass(frozen=True)
class Corpus:
    """Documents as token ids.

    Attributes:
        name: where the text came from, as the user wrote it.
        documents: one int32 array [tokens] for each document.
    """

    name: str
    documents: list[NDArray[np.int32]]

    @property
    def lengths(self) -> list[int]:
        return [len(document) for document in self.documents]

    @property
    def digest(self) -> str:
        """Fingerprint of all token ids and of where documents end."""
        sha = hashlib.sha256()
        for document in self.documents:
            sha.update(len(document).to_bytes(8, "little"))
            sha.update(document.astype("<i4").tobytes())
        return sha.hexdigest()[:16]

    def reaching(self, length: int) -> Corpus:
        """The documents of at least `length` tokens."""
        return Corpus(self.name, [tokens for tokens in self.documents if len(tokens) >= length])


def read_corpus(
    data: str | Path,
    tokenizer: Any,
    *,
    text_field: str = "text",
    split: str | None = None,
    max_tokens: int | None = None,
) -> Corpus:
    """Read and tokenize documents, each with the special tokens that the tokenizer adds to a text.

    Args:
        data: a text file (one document), a JSON Lines file (a document a line), a folder of such
            files, or a Hugging Face dataset, `name` or `name:configuration`.
        text_field: the field that holds a document's text.
        split: split of a Hugging Face dataset; by default test, validation or train.
        max_tokens: stop after so many tokens in all; the last document is cut.

    Raises:
        ValueError: nothing there, or something that is not text; says what is expected.
    """
    documents = []
    left = max_tokens
    for text in read_texts(data, text_field=text_field, split=split, stream=left is not None):
        # Books are longer than the maximum that a tokenizer warns of; windows are not.
        tokens = np.asarray(tokenizer(text, verbose=False)["input_ids"], dtype=np.int32)
        if left is not None:
            tokens = tokens[:left]
            left -= len(tokens)
        documents.append(tokens)
        if left == 0:
            break
    if not documents:
        raise ValueError(f"{data} holds no document; expected text, found none")
    return Corpus(str(data), documents)


def read_texts(
    data: str | Path,
    *,
    text_field: str = "text",
    split: str | None = None,
    stream: bool = False,
) -> Iterator[str]:
    """The documents of `data` as text, one by one; see `read_corpus`."""
    path = Path(data)
    if path.is_dir():
        files = sorted(
            file
            for file in path.rglob("*")
            if file.suffix.lower() in (*TEXT_SUFFIXES, *JSON_LINES_SUFFIXES)
        )
        if not files:
            raise ValueError(
                f"folder {path} holds no {', '.join((*TEXT_SUFFIXES, *JSON_LINES_SUFFIXES))} file"
            )
        for file in files:
            yield from _read_file(file, text_field)
    elif path.is_file():
        yield from _read_file(path, text_field)
    elif path.suffix or path.is_absolute() or str(data).startswith("."):
        raise ValueError(
            f"no file or folder {data}; give a text file, a JSON Lines file with a "
            f"{text_field!r} field, a folder of those, or the name of a Hugging Face dataset"
        )
    else:
        yield from _read_dataset(str(data), text_field, split, stream)


def _read_file(path: Path, text_field: str) -> Iterator[str]:
    try:
        if path.suffix.lower() in JSON_LINES_SUFFIXES:
            with path.open(encoding="utf-8") as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        yield _text_of_line(line, f"{path}, line {number}", text_field)
        elif text := path.read_text(encoding="utf-8"):
            yield text
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None


def _text_of_line(line: str, where: str, text_field: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error})") from None
    return _text_of(row, where, text_field)


def _text_of(row: Any, where: str, text_field: str) -> str:
    if not isinstance(row, Mapping):
        raise ValueError(f"{where}: expected an object with a {text_field!r} field, got {row!r}")
    text = row.get(text_field)
    if not isinstance(text, str):
        fields = ", ".join(map(str, row)) or "none"
        raise ValueError(
            f"{where}: no text in field {text_field!r}; its fields: {fields}. "
            "Perplexity needs running text: name the field with --text-field"
        )
    return text


def _read_dataset(name: str, text_field: str, split: str | None, stream: bool) -> Iterator[str]:
    import datasets

    path, _, configuration = name.partition(":")
    try:
        if split is None:
            found = datasets.get_dataset_split_names(path, configuration or None)
            split = next((known for known in SPLITS if known in found), found[0])
        rows = datasets.load_dataset(path, configuration or None, split=split, streaming=stream)
    except Exception as error:
        raise ValueError(
            f"{name!r} is no file or folder here, and loading it as a Hugging Face dataset "
            f"failed: {error}"
        ) from None
    for number, row in enumerate(rows):
        yield _text_of(row, f"{name}, {split} row {number}", text_field)


def held_out_data(raw: Mapping[str, Any]) -> tuple[list[str], str]:
    """Held-out data that a recipe names in `test_datasets`: paths, and their text field.

    Raises:
        ValueError: it names none; says to give the data.
    """
    paths: list[str] = []
    text_field = "text"
    for entry in raw.get("test_datasets") or []:
        files = entry.get("data_files") or entry.get("path")
        paths += [files] if isinstance(files, str) else list(files or [])
        kind = entry.get("type")
        text_field = (
            entry.get("field")
            or (kind.get("field") if isinstance(kind, Mapping) else None)
            or text_field
        )
    if not paths:
        raise ValueError(
            "no data to evaluate on: the recipe has no test_datasets. Give --data FILE, a folder "
            "or a dataset's name"
        )
    return paths, text_field


def join(corpora: Sequence[Corpus]) -> Corpus:
    """Several corpora as one."""
    documents: Iterable[NDArray[np.int32]] = (
        document for corpus in corpora for document in corpus.documents
    )
    return Corpus(", ".join(corpus.name for corpus in corpora), list(documents))

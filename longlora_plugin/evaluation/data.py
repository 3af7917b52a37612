"""Text to evaluate on: files, folders and Hugging Face datasets as documents of token ids.

Documents stay apart all the way: a window never reads two of them. `datasets` reads every kind of
file; what is said of a wrong one is ours.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longlora_plugin.run.prepare import PreparedRun

READERS = {"json": (".jsonl", ".ndjson", ".json"), "text": (".txt", ".md", ".text")}
"""What reads a file: the name of a builder of `datasets`, and the suffixes."""
SPLITS = ("test", "validation", "train")
"""Splits of a dataset in the order in which they are looked for."""


@dataclass(frozen=True)
class Corpus:
    """Documents as token ids.

    Attributes:
        name: where the text came from, as the user wrote it.
        documents: one int32 array [tokens] for each document.
        texts: the text of each document, as far as its tokens reach.
    """

    name: str
    documents: list[NDArray[np.int32]]
    texts: list[str]

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

    @property
    def largest_id(self) -> int:
        return max((int(document.max()) for document in self.documents if len(document)), default=0)

    def only(self, indices: Sequence[int]) -> Corpus:
        """Some of the documents."""
        return Corpus(
            self.name,
            [self.documents[index] for index in indices],
            [self.texts[index] for index in indices],
        )

    def tokenized_by(self, tokenizer: Any) -> Corpus:
        """The same text in another tokenizer's tokens."""
        return Corpus(self.name, [_tokens(text, tokenizer) for text in self.texts], self.texts)


def read_corpus(
    data: str | Path | Sequence[str | Path],
    tokenizer: Any,
    *,
    text_field: str = "text",
    split: str | None = None,
    max_tokens: int | None = None,
) -> Corpus:
    """Read and tokenize documents, each with the special tokens that the tokenizer adds to a text.

    Args:
        data: a text file (one document), a JSON Lines file (a document a line), a folder of such
            files, or a Hugging Face dataset, `name` or `name:configuration`; or several of those.
        text_field: the field that holds a document's text.
        split: split of a Hugging Face dataset; by default test, validation or train.
        max_tokens: stop after so many tokens of each of `data`; the last document is cut.

    Raises:
        ValueError: nothing there, or something that is not text; says what is expected.
    """
    sources = [data] if isinstance(data, str | Path) else list(data)
    documents: list[NDArray[np.int32]] = []
    texts: list[str] = []
    for source in sources:
        left, found = max_tokens, len(texts)
        for text in read_texts(source, text_field=text_field, split=split, stream=left is not None):
            tokens = _tokens(text, tokenizer)
            if left is not None:
                if len(tokens) > left:
                    text, tokens = _first(text, tokens, left, tokenizer), tokens[:left]
                left -= len(tokens)
            documents.append(tokens)
            texts.append(text)
            if left == 0:
                break
        if len(texts) == found:
            raise ValueError(f"{source} holds no document; expected text, found none")
    return Corpus(", ".join(map(str, sources)), documents, texts)


def _tokens(text: str, tokenizer: Any) -> NDArray[np.int32]:
    # Books are longer than the maximum that a tokenizer warns of; windows are not.
    return np.asarray(tokenizer(text, verbose=False)["input_ids"], dtype=np.int32)


def _first(text: str, tokens: NDArray[np.int32], count: int, tokenizer: Any) -> str:
    """The text of the first tokens."""
    if getattr(tokenizer, "is_fast", False):
        encoded = tokenizer(text, verbose=False, return_offsets_mapping=True)
        return text[: max(end for _, end in encoded["offset_mapping"][:count])]
    decoded: str = tokenizer.decode(tokens[:count].tolist(), skip_special_tokens=True)
    return decoded


def check_held_out(
    data: str | Path, length: int, tokenizer: str, *, trust_remote_code: bool = False
) -> None:
    """Refuse held-out text that cannot be read or is too short, before a model loads.

    Args:
        length: tokens that one document must have.
        tokenizer: folder or name; where it cannot be read, lengths are not checked.

    Raises:
        ValueError: says what is expected.
    """
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=trust_remote_code)
    except (OSError, ValueError):
        loaded = None
    longest = -1
    for text in read_texts(data, stream=True):
        longest = max(longest, length if loaded is None else len(_tokens(text, loaded)))
        if longest >= length:
            return
    if longest < 0:
        raise ValueError(f"{data} holds no document; expected text, found none")
    raise ValueError(
        f"no document of {data} has {length} tokens, the longest has {longest}; give longer ones"
    )


def check_held_out_of(run: PreparedRun) -> None:
    """Refuse the text that a run names as `held_out`, if it cannot be read or is too short.

    Raises:
        ValueError: says what is expected.
    """
    try:
        check_held_out(
            str(run.block.held_out),
            run.target_context,
            run.tokenizer,
            trust_remote_code=run.remote_code,
        )
    except ValueError as error:
        raise ValueError(f"longlora.held_out: {error}") from error


def read_texts(
    data: str | Path,
    *,
    text_field: str = "text",
    split: str | None = None,
    stream: bool = False,
) -> Iterator[str]:
    """The documents of `data` as text, one by one; see `read_corpus`."""
    path = Path(data).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if _reader(file))
        if not files:
            suffixes = ", ".join(suffix for known in READERS.values() for suffix in known)
            raise ValueError(f"folder {path} holds no {suffixes} file")
        for reader in READERS:
            if mine := [str(file) for file in files if _reader(file) == reader]:
                yield from _read_files(reader, mine, str(path), text_field)
    elif path.is_file():
        yield from _read_files(_reader(path) or "text", [str(path)], str(path), text_field)
    elif _can_only_be_a_path(str(data)):
        raise ValueError(
            f"no file or folder {data}; give a text file, a JSON Lines file with a "
            f"{text_field!r} field, a folder of those, or the name of a Hugging Face dataset"
        )
    else:
        yield from _read_dataset(str(data), text_field, split, stream)


def _reader(path: Path) -> str | None:
    suffix = path.suffix.lower()
    return next((name for name, suffixes in READERS.items() if suffix in suffixes), None)


def _can_only_be_a_path(data: str) -> bool:
    return data.startswith((".", "/", "~")) or bool(Path(data).suffix) or data.count("/") > 1


def _read_files(reader: str, files: list[str], name: str, text_field: str) -> Iterator[str]:
    import datasets

    options = {"sample_by": "document"} if reader == "text" else {}
    try:
        # Streamed: a file that is read once needs no copy in the cache.
        rows = iter(
            datasets.load_dataset(
                reader, data_files=files, split="train", streaming=True, **options
            )
        )
        number = 0
        while (row := next(rows, None)) is not None:
            number += 1
            where = f"{name}, row {number}"
            text = _text_of(row, where, "text" if reader == "text" else text_field)
            if text:
                yield text
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text: {error}") from None
    except (OSError, ValueError, TypeError) as error:
        if str(error).startswith(f"{name}, row"):
            raise
        raise ValueError(f"{name} cannot be read as {reader}: {error}") from None


def _text_of(row: Any, where: str, text_field: str) -> str:
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
    for number, row in enumerate(rows, 1):
        yield _text_of(row, f"{name}, {split} row {number}", text_field)

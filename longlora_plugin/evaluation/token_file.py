"""Token-level losses in a safetensors file, for one's own analysis.

Tensors, all over the T scored tokens (each document's tokens but its first, in reading order):

- `token_id` int32 [T], `document` int32 [T], `position` int32 [T] (in the document);
- `<model>/<length>/nll` float32 [T]: loss in nats where the token was new; NaN where no window
  scored it.

The file's metadata give `data`, `data_digest`, and the settings of each row in the JSON file.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from longlora_plugin.checkpoints.files import whole_file
from longlora_plugin.evaluation.data import Corpus
from longlora_plugin.evaluation.results import Row


class TokenFile:
    """The file at `path`; what it already holds for the same corpus is kept."""

    def __init__(self, path: str | Path, corpus: Corpus) -> None:
        self._path = Path(path).expanduser()
        documents = [document for document in corpus.documents if len(document) > 1]
        self._tensors: dict[str, NDArray[np.generic]] = {
            "token_id": np.concatenate([document[1:] for document in documents]),
            "document": np.concatenate(
                [np.full(len(d) - 1, i, dtype=np.int32) for i, d in enumerate(documents)]
            ),
            "position": np.concatenate([np.arange(1, len(d), dtype=np.int32) for d in documents]),
        }
        self._metadata = {"data": corpus.name, "data_digest": corpus.digest}
        if self._path.exists():
            self._read(corpus.digest)

    def _read(self, digest: str) -> None:
        try:
            with safe_open(str(self._path), framework="np") as file:
                metadata = file.metadata() or {}
                if metadata.get("data_digest") == digest:
                    self._metadata |= metadata
                    self._tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{self._path} exists and is not a safetensors file ({error}); "
                "write --tokens to another file"
            ) from None

    def settings(self) -> set[str]:
        """Settings of the rows whose tokens it holds."""
        return {value for name, value in self._metadata.items() if "/" in name}

    def add(self, row: Row, losses: NDArray[np.float32]) -> None:
        """Add the token losses [T] of one row, and write the file."""
        name = f"{row['model']}/{row['length']}"
        self._tensors[f"{name}/nll"] = losses
        self._metadata[name] = row["settings"]
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(self._path) as partial:
            partial.write_bytes(save(self._tensors, metadata=self._metadata))

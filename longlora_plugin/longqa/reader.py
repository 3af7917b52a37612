"""Files become documents, each read in a worker process; a bad file becomes one clear reason.

The worker (`parsers`) has a cap on memory, and its parent a time limit that ends it whatever it
does: what a broken or hostile file does there costs that file, not a build of many hours.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import types
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from longlora_plugin.longqa.documents import Document, Limits, Unreadable
from longlora_plugin.longqa.parsers import prepare_worker, read_document

_FORMATS = {
    ".txt": "plain",
    ".text": "plain",
    ".rst": "plain",
    ".tex": "plain",
    ".md": "markdown",
    ".markdown": "markdown",
    ".html": "html",
    ".htm": "html",
    ".xhtml": "html",
    ".pdf": "pdf",
    ".epub": "epub",
}


class Reader:
    """Reads files in a worker process, which a `with` block ends."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self._pool: ProcessPoolExecutor | None = None
        self._worker = 0

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop_worker()

    def read(self, path: Path, name: str, within: Path | None = None) -> Document:
        """The document in `path`.

        Args:
            within: the folder that links must not lead out of.

        Raises:
            Unreadable: says why, and what to do about it where something can be done.
        """
        try:
            form = self._format(path, within)
            pool = self._start_worker()
            reading = pool.submit(read_document, path.absolute(), name, form, self.limits)
            return reading.result(self.limits.read_seconds)
        except OSError as error:
            if not isinstance(error, TimeoutError):
                raise Unreadable(f"cannot be read: {error.strerror or error}") from None
            self._stop_worker()
            raise Unreadable(
                f"took longer than {self.limits.read_seconds:g} s to parse; split it, or raise "
                "--read-seconds"
            ) from None
        except BrokenProcessPool:
            self._stop_worker()
            raise Unreadable("crashed its parser; it is damaged or a bomb") from None

    def _format(self, path: Path, within: Path | None) -> str:
        if within is not None:
            target = Path(os.path.realpath(path))
            if not target.is_relative_to(within.resolve()):
                raise Unreadable(f"is a link out of the folder, to {target}; copy the file in")
        if path.is_dir():
            linked = path.is_symlink()
            raise Unreadable(
                f"is a folder that {'is only linked' if linked else 'cannot be listed'}; not read"
            )
        if not path.is_file():
            raise Unreadable("is not a regular file")
        size = path.stat().st_size
        if size == 0:
            raise Unreadable("is empty (0 bytes)")
        if size > self.limits.max_bytes:
            raise Unreadable(
                f"is {size / 1e6:,.1f} MB, above the limit of {self.limits.max_bytes / 1e6:g} MB; "
                f"split it, or write --max-file-mb {size // 1_000_000 + 1}"
            )
        with path.open("rb") as stream:
            head = stream.read(64)
        if head.startswith(b"%PDF-"):
            return "pdf"
        if head.startswith(b"PK\x03\x04") and b"application/epub+zip" in head:
            return "epub"
        numbered = not path.suffix or path.suffix[1:].isdigit()
        form = _FORMATS.get(path.suffix.lower(), "plain" if numbered else None)
        if form is None:
            raise Unreadable(f"is of a type that is not read ({path.suffix})")
        return form

    def _start_worker(self) -> ProcessPoolExecutor:
        if self._pool is None:
            self._pool = ProcessPoolExecutor(
                1, multiprocessing.get_context("spawn"), initializer=prepare_worker
            )
            with _no_main_module():
                self._worker = self._pool.submit(os.getpid).result()
        return self._pool

    def _stop_worker(self) -> None:
        if self._pool is not None:
            # A worker that is stuck in a parser takes no request to end.
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._worker, signal.SIGKILL)
            self._pool.shutdown(cancel_futures=True)
            self._pool = None


@contextlib.contextmanager
def _no_main_module() -> Iterator[None]:
    """Hides the running program from a new process, which would import it: all of Axolotl here."""
    main, sys.modules["__main__"] = sys.modules["__main__"], types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main

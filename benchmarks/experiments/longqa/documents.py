"""One text file for each book.

    python -m benchmarks.experiments.longqa.documents BOOKS.jsonl FOLDER

`BOOKS.jsonl` is a file of `quickstart/text.py`; FOLDER is what `longlora longqa build`
reads, as it would a folder of your own documents.
"""

import json
import re
import sys
from pathlib import Path


def write_books(source: Path, folder: Path) -> list[Path]:
    """The files written, one for each row of `source` (`text`, `title`)."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for line in source.read_text(encoding="utf-8").splitlines():
        book = json.loads(line)
        name = re.sub(r"\W+", "-", book["title"].lower()).strip("-")
        written.append(folder / f"{name}.txt")
        written[-1].write_text(book["text"], encoding="utf-8")
    return written


if __name__ == "__main__":
    files = write_books(Path(sys.argv[1]), Path(sys.argv[2]))
    print(f"{sys.argv[2]}: {len(files)} books")

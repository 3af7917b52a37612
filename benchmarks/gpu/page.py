"""`docs/reference/gpu.md` from the results that are committed; loads no torch."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.gpu.cases import BACKENDS, DTYPES, GPU, cases, find, key, section_of

RESULTS = Path(__file__).with_name("results.json")
NOT_MEASURED = "not measured"
PARTS = ("out", "dq", "dk", "dv")

HEAD = """\
Is every back end right on a GPU, and how fast is S²-Attn there? Targets on one H100, as ratios of
one run: S² over the floor at most 1.15 at 8k tokens and 1.05 from 32k on; over full attention at
most 0.35 at 32k and 0.30 at 128k; a 7B-shaped training step, full over S², at least 1.45 at 32k
and 1.75 at 64k (the paper's Table 12: 1.48 and 1.77); peak memory within 10 % of `plan`; no wait
for the GPU inside a layer.

"""

HOW = """
## Run it

```bash
make gpu    # ten minutes on one GPU, then the gpu tests
make gpu GPU="--budget 300 --sections exact,attention"
# tries every line of it without a GPU:
python -m benchmarks.gpu --tiny --device cpu --out outputs/gpu-tiny
```

Every result is in `outputs/gpu/rows.jsonl` the moment it is there; the same command goes on where
the last one ended. What no time is left for says so (`--budget`, seconds). A result that is not
what the definition says, or an error, is printed at the end, and the command fails. To publish,
copy `outputs/gpu/results.json` to `benchmarks/gpu/results.json` and run `python
docs/generate.py`.

### Without a network

The benchmark needs Python 3.11 or 3.12 with a CUDA build of torch ≥ 2.11, transformers ≥ 5.16,
peft and triton, and neither Axolotl nor a model nor a data set: weights are random. What the
machine lacks is brought as wheels, made on one with a network:

```bash
pip download --dest wheels --only-binary :all: --python-version 3.12 \\
    click hypothesis matplotlib pluggy pydantic pytest rich
git archive --output wheels/longlora.tar HEAD
# there:
pip install --no-index --find-links wheels \\
    click hypothesis matplotlib pluggy pydantic pytest rich
tar xf wheels/longlora.tar
make gpu
```

FlashAttention is measured where it is installed: bring the wheel of flash-attn (2, or
`flash-attn-4`) that fits the machine's torch and CUDA. Without it, PyTorch's own kernels are.
"""


def page(path: Path = RESULTS) -> str:
    """The text below the page's title."""
    results = json.loads(path.read_text(encoding="utf-8"))
    rows = results["rows"]
    if results["tiny"]:
        raise ValueError(f"{path}: results of --tiny are no measurements; run without it")
    where = results["machine"]
    measured = (
        f"Measured on: {where}." if where else "**No GPU machine came: nothing is measured.**"
    )
    parts = [HEAD, measured + "\n", exact(rows), attention(rows), step(rows), profile(rows), HOW]
    return "".join(parts)


def cell(rows: list[dict[str, Any]], section: str, case: Any) -> tuple[dict[str, Any], str]:
    """The result of a case, and what to write where there is none."""
    row = find(rows, key(section, case))
    return row.get("result") or {}, row.get("not_run") or row.get("error") or NOT_MEASURED


def table(header: str, lines: Iterable[Iterable[str]]) -> str:
    names = header.split("|")
    rule = "|".join("---" for _ in names)
    body = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return f"\n|{header}|\n|{rule}|\n{body}"


def exact(rows: list[dict[str, Any]]) -> str:
    lines = []
    for backend in BACKENDS:
        for dtype in DTYPES:
            alike = [
                cell(rows, section_of(backend), case)
                for case in cases(section_of(backend), GPU)
                if (case.backend, case.dtype) == (backend, dtype)
            ]
            there = [result for result, _ in alike if result]
            if not alike:
                continue
            if not there:
                lines.append((backend, dtype, alike[0][1], "", ""))
                continue
            worst = max(result[part] for result in there for part in PARTS)
            right = f"{sum(result['right'] for result in there)} of {len(alike)}"
            kernels = dict.fromkeys(name for result in there for name in result["kernels"])
            shown = ", ".join(f"`{name}`" for name in list(kernels)[:4])
            lines.append((backend, dtype, right, f"{worst:.1e}", shown))
    return (
        "\n## Right?\n\nOutput and gradients against dense masks in float64: plain rows of an odd "
        "length, packed and padded ones, heads 8/8, 8/2 and 8/1.\n"
        + table(" back end | dtype | right | largest error | kernels ", lines)
    )


def attention(rows: list[dict[str, Any]]) -> str:
    lines = []
    for case in cases("attention", GPU):
        result, why = cell(rows, "attention", case)
        shape = (f"{case.heads}/{case.kv_heads}", f"{case.length}")
        if not result:
            lines.append((*shape, why, "", "", "", ""))
        for name, ratio in result.get("over_full", {}).items():
            lines.append(
                (
                    *shape,
                    name.removeprefix("s2 "),
                    f"{result['seconds'][name] * 1000:.2f}",
                    f"{ratio:.2f}",
                    f"{result['over_floor'][name]:.2f}",
                    f"{result['peak_mib'][name]:.0f}",
                )
            )
    return (
        "\n## Attention alone\n\nForward and backward in bf16, head_dim 128, groups of a quarter. "
        "The floor is SDPA on tensors grouped beforehand, with the same strides.\n"
        + table(" heads | tokens | back end | ms | ÷ full | ÷ floor | peak MiB ", lines)
    )


def step(rows: list[dict[str, Any]]) -> str:
    lines = []
    for case in cases("step", GPU):
        result, why = cell(rows, "step", case)
        if not result:
            lines.append((f"{case.length}", case.attention, why, "", ""))
            continue
        peak = NOT_MEASURED if result["peak_gib"] is None else f"{result['peak_gib']:.1f}"
        planned = f"{result['planned_gib']:.1f}"
        seconds = f"{result['seconds']:.2f}"
        lines.append((f"{case.length}", case.attention, seconds, peak, planned))
    return (
        "\n## A training step\n\nOf a model in the shape of Llama 2 7B with random weights: LoRA "
        "on the projections, embeddings and norms in fp32, checkpointing, one row.\n"
        + table(" tokens | attention | seconds | peak GiB | `plan` GiB ", lines)
    )


def profile(rows: list[dict[str, Any]]) -> str:
    lines = []
    for case in cases("profile", GPU):
        result, why = cell(rows, "profile", case)
        if not result:
            lines.append((f"{case.length}", case.attention, why, "", ""))
            continue
        waits = result["waits"]
        where = "" if not waits else ", ".join(f"`{line}` × {n}" for line, n in waits.items())
        count = NOT_MEASURED if waits is None else f"{sum(waits.values())}"
        share = f"{result['copies_share']:.1%}"
        lines.append((f"{case.length}", case.attention, count, where, share))
    return "\n## Where a step's time goes\n" + table(
        " tokens | attention | waits for the GPU | where | share of copies ", lines
    )

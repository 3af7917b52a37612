"""How much memory a GPU has, and how fast it multiplies."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU.

    Attributes:
        name: as `--gpu` takes it.
        memory: GiB, the total that the vendor's tool (nvidia-smi, rocm-smi) shows with ECC on;
            what the driver keeps of it is in `memory.CONTEXT`.
        tflops: dense matrix products in bf16 (fp16 where there is no bf16) with fp32 sums, TFLOP/s
            of the vendor's data sheet, without sparsity; None for a GPU of which only the size is
            known.
        capability: compute capability as Axolotl writes it (`sm_80`), without the letters.
    """

    name: str
    memory: float
    tflops: float | None = None
    capability: int = 80


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("t4-16gb", 15.0, 65, 75),
        Gpu("a10g-24gb", 22.5, 70, 86),
        Gpu("l4-24gb", 22.5, 121, 89),
        Gpu("rtx3090-24gb", 24.0, 71, 86),
        Gpu("rtx4090-24gb", 24.0, 165, 89),
        Gpu("v100-32gb", 31.7, 125, 70),
        Gpu("rtx5090-32gb", 31.8, 210, 120),
        Gpu("a100-40gb", 40.0, 312, 80),
        Gpu("l40s-48gb", 45.0, 362, 89),
        Gpu("a6000-48gb", 48.0, 155, 86),
        Gpu("a100-80gb", 80.0, 312, 80),
        Gpu("h100-80gb", 79.6, 989, 90),
        Gpu("h200-141gb", 140.4, 989, 90),
        Gpu("b200-180gb", 179.0, 2250, 100),
        Gpu("mi300x-192gb", 192.0, 1307, 94),
    )
}


MOST = 1024
"""GiB of the largest GPU; a larger number is the name of one (4090)."""


def find_gpu(name: str) -> Gpu:
    """The GPU called `name`; a plain size (`48gb`, `48`) is a GPU of so many GiB.

    Raises:
        ValueError: neither a known name nor a size; names the valid ones.
    """
    key = name.strip().lower().replace("_", "-").replace(" ", "-")
    if key in GPUS:
        return GPUS[key]
    size = re.fullmatch(r"(\d+(?:\.\d+)?)-?(?:gi?b)?", key)
    if size and 0 < float(size[1]) <= MOST:
        return Gpu(key, float(size[1]))
    model = key.split("-")[0]
    near = [known for known in GPUS if model and known.split("-")[0].endswith(model)]
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise ValueError(
        f"--gpu: unknown GPU {name!r}; {hint}valid: {', '.join(GPUS)}, or a size such as 48gb"
    )

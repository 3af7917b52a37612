"""What is tried on a machine: attention back ends, quantized layers, launchers."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from longlora_plugin.doctor.machine import DISTRIBUTION
from longlora_plugin.run.context_parallel import package_that_cuts_rows

INSTALL = {
    "bitsandbytes": "pip install bitsandbytes",
    "deepspeed": f'DS_BUILD_OPS=0 pip install "{DISTRIBUTION}[deepspeed]"',
    "flash_attn": f'pip install --no-build-isolation "{DISTRIBUTION}[flash-attn]"',
    "flash_attn_interface": "build FlashAttention 3 from the `hopper` folder of its repository",
    "flash_attn.cute": "pip install flash-attn-4",
    "ring_flash_attn": "pip install ring-flash-attn",
    "ringmaster": f'pip install "{DISTRIBUTION}[ringmaster]"',
}
"""Module → how to get it."""
BACKENDS = {
    "sdpa": None,
    "eager": None,
    "flex_attention": None,
    "flash_attention_2": "flash_attn",
    "flash_attention_3": "flash_attn_interface",
    "flash_attention_4": "flash_attn.cute",
}
"""Attention implementation → the optional module it needs."""
COMPILES = frozenset({"flex_attention"})
LAUNCHER_SECONDS = 240
"""DeepSpeed compiles its communication once, on a CPU in about a minute."""
AFTER_EVALUATION = ", after an evaluation"
"""bitsandbytes repacks weights for inference on some CPUs, and training then loses its gradient."""

WORKS, FAILS, MISSING, NOT_TRIED = "works", "fails", "missing", "not tried"


@dataclass(frozen=True)
class Trial:
    """One thing that was tried.

    Attributes:
        name: what: an attention implementation, `bitsandbytes 4-bit`, `deepspeed`, ….
        state: `works`, `fails`, `missing` (a package is not installed) or `not tried`.
        detail: what was seen: the agreement, the error, or the install line.
        seconds: how long it took.
    """

    name: str
    state: str
    detail: str
    seconds: float = 0.0


def trials_for(device: str) -> dict[str, tuple[Callable[[], str], bool]]:
    """Name → (function that returns what it saw, or raises; whether it is slow)."""
    trials: dict[str, tuple[Callable[[], str], bool]] = {
        name: (partial(try_attention, name, device), name in COMPILES) for name in BACKENDS
    }
    for bits in (4, 8):
        for evaluated, when in ((False, ""), (True, AFTER_EVALUATION)):
            trials[f"bitsandbytes {bits}-bit{when}"] = (
                partial(try_bitsandbytes, bits, device, evaluated),
                False,
            )
    cuts_rows = package_that_cuts_rows()
    trials[cuts_rows] = (partial(try_import, cuts_rows), False)
    for launcher in ("deepspeed", "fsdp", "context_parallel"):
        trials[launcher] = (partial(try_launcher, launcher), True)
    return trials


class Missing(Exception):
    """An optional package is not installed; the message is the install line."""


def tried(name: str, attempt: Callable[[], str]) -> Trial:
    """Run one trial; whatever it raises is what was found out."""
    start = time.perf_counter()
    try:
        state, detail = WORKS, attempt()
    except Missing as error:
        state, detail = MISSING, str(error)
    except Exception as error:
        text = str(error).strip()
        lines = text.splitlines() or [repr(error)]
        state, detail = FAILS, f"{type(error).__name__}: {lines[0]}"
    return Trial(name, state, detail, round(time.perf_counter() - start, 1))


def _need(module: str | None) -> None:
    if module is None:
        return
    try:
        found = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        found = False
    if not found:
        raise Missing(f"not installed: {INSTALL[module]}")


def try_attention(implementation: str, device: str) -> str:
    """S²-Attn forward and backward against its definition, on a small odd-sized example."""
    import torch

    from longlora_plugin.attention import shifted_sparse_attention

    _need(BACKENDS[implementation])
    flash = "flash" in implementation
    dtype = torch.bfloat16 if flash else torch.float32
    heads, kv_heads, length, head_dim, group = 4, 2, 37, 32, 8
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(1, count, length, head_dim, generator=generator)
        .to(device, dtype)
        .requires_grad_()
        for count in (heads, kv_heads, kv_heads)
    ]
    weight = torch.randn(1, heads, length, head_dim, generator=generator).to(device)
    results = []
    for attend in (
        partial(shifted_sparse_attention, group_size=group, backend=implementation),
        partial(_by_definition, group_size=group),
    ):
        out = attend(*inputs)
        gradients = torch.autograd.grad((out.float() * weight).sum(), inputs)
        results.append([out.detach(), *gradients])
    error = max(
        float((ours.float() - wanted.float()).abs().max() / wanted.float().abs().max())
        for ours, wanted in zip(*results, strict=True)
    )
    allowed = 2e-2 if flash else 1e-4
    if not error <= allowed:
        raise ValueError(f"S²-Attn is wrong by {error:.1e} of the largest value")
    return f"forward and backward equal the definition ({dtype}, error {error:.0e})"


def _by_definition(query: Any, key: Any, value: Any, *, group_size: int) -> Any:
    """S²-Attn with a dense mask [H, N, N], in float64."""
    import torch

    from longlora_plugin.attention.layout import S2

    heads, kv_heads, length = query.shape[1], key.shape[1], query.shape[2]
    position = torch.arange(length, device=query.device)
    shifts = torch.tensor(S2.shifts(kv_heads, group_size), device=query.device)
    segment_HN = ((position + shifts[:, None]) // group_size).repeat_interleave(
        heads // kv_heads, 0
    )
    allowed_HNN = (segment_HN[:, :, None] == segment_HN[:, None, :]) & (
        position[:, None] >= position
    )
    key, value = (
        tensor.repeat_interleave(heads // kv_heads, 1).double() for tensor in (key, value)
    )
    scores = query.double() @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    return scores.masked_fill(~allowed_HNN, float("-inf")).softmax(-1) @ value


def try_bitsandbytes(bits: int, device: str, evaluated: bool) -> str:
    """A quantized linear layer: output and gradient against its own dequantized weights.

    Args:
        bits: 4 (NF4) or 8.
        evaluated: run it in evaluation mode first, as an evaluation between training steps does.
    """
    import torch

    _need("bitsandbytes")
    import bitsandbytes as bnb

    torch.manual_seed(0)
    plain = torch.nn.Linear(128, 128, bias=False)
    if bits == 4:
        layer = bnb.nn.Linear4bit(128, 128, bias=False, quant_type="nf4")
    else:
        layer = bnb.nn.Linear8bitLt(128, 128, bias=False, has_fp16_weights=False)
    layer.load_state_dict(plain.state_dict())
    layer = layer.to(device)
    weight = plain.weight.detach().to(device)
    if bits == 4:
        weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    # 8-bit layers round their input too.
    allowed = 1e-2 if bits == 4 else 5e-2
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    x = torch.randn(4, 128).to(device, dtype)
    if evaluated:
        layer.eval()
        with torch.no_grad():
            layer(x)
    layer.train()
    x.requires_grad_()
    out = layer(x)
    (gradient,) = torch.autograd.grad(out.float().sum(), x, allow_unused=True)
    if gradient is None:
        raise ValueError("no gradient goes through it")
    with torch.no_grad():
        pairs = ((out, x.float() @ weight.T), (gradient, weight.sum(0).expand(4, -1)))
        error = max(float((got.float() - w).abs().max() / w.abs().max()) for got, w in pairs)
    if not error <= allowed:
        raise ValueError(f"its output or gradient is wrong by {error:.1e} of the largest value")
    return f"output and gradient equal the dequantized weights (error {error:.0e})"


def try_import(module: str) -> str:
    """A package that Axolotl imports by itself."""
    _need(module)
    importlib.import_module(module)
    return "it is installed and loads"


def try_launcher(launcher: str) -> str:
    """One step under DeepSpeed or FSDP2, or one of two processes that share a row, in a process of
    its own.
    """
    if launcher == "deepspeed":
        _need("deepspeed")
    command = [sys.executable, "-m", "longlora_plugin.doctor.launcher_step", launcher]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=LAUNCHER_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ValueError(f"no answer after {LAUNCHER_SECONDS} s") from None
    for line in done.stdout.splitlines():
        if line.startswith("TRIAL "):
            return line.removeprefix("TRIAL ")
    errors = [line for line in done.stderr.splitlines() if "Error" in line]
    raise ValueError(errors[-1] if errors else f"it ended with exit status {done.returncode}")

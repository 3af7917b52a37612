"""What this machine and these versions support, each tried rather than assumed; and what a recipe
comes to here: what is on, what is off, and why.

A back end works where its forward and backward pass agree with the definition of S²-Attn, written
out densely; a quantized layer where its gradient agrees with the dequantized weights, also after
an evaluation; a launcher where one step of it, in a process of its own, equals plain SGD.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

DISTRIBUTION = "longlora-plugin"
PACKAGES = (
    "axolotl",
    "transformers",
    "peft",
    "torch",
    "accelerate",
    "bitsandbytes",
    "deepspeed",
    "flash-attn",
)
INSTALL = {
    "bitsandbytes": "pip install bitsandbytes",
    "deepspeed": f'DS_BUILD_OPS=0 pip install "{DISTRIBUTION}[deepspeed]"',
    "flash_attn": f'pip install --no-build-isolation "{DISTRIBUTION}[flash-attn]"',
    "flash_attn_interface": "build FlashAttention 3 from the `hopper` folder of its repository",
    "flash_attn.cute": "pip install flash-attn-4",
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
LORA_KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel")

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


@dataclass(frozen=True)
class Finding:
    """One thing about a recipe.

    Attributes:
        what: for example `RoPE`.
        on: whether it will be.
        why: how, or why not.
    """

    what: str
    on: bool
    why: str


@dataclass
class Diagnosis:
    """Everything the doctor says.

    Attributes:
        versions: package → version; None where it is not installed.
        device: `kind` (`cuda` or `cpu`), `name`, `memory` in GiB, `bf16`, `count`.
        trials: what was tried on this machine.
        recipe: the recipe's path, if one was given.
        findings: what is on and what is off in it.
        problems: why the recipe cannot run here; none where it can.
        notes: what else to know.
    """

    versions: dict[str, str | None]
    device: dict[str, Any]
    trials: list[Trial]
    recipe: str | None = None
    findings: list[Finding] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "runs": None if self.recipe is None else not self.problems}


def diagnose(
    recipe: Path | None = None,
    *,
    quick: bool = False,
    progress: Callable[[str], None] = lambda name: None,
) -> Diagnosis:
    """Try what this machine can do and, if given, say what a recipe comes to on it.

    Args:
        recipe: a YAML file.
        quick: leave out what starts processes or compiles kernels; the recipe is then not judged
            by those.
        progress: called with the name of each trial before it.
    """
    device = this_device()
    trials = []
    for name, (attempt, slow) in trials_for(device["kind"]).items():
        progress(name)
        trials.append(
            Trial(name, NOT_TRIED, "left out by --quick")
            if quick and slow
            else tried(name, attempt)
        )
    diagnosis = Diagnosis(versions(), device, trials)
    diagnosis.problems += unsupported_versions(diagnosis.versions)
    if recipe is not None:
        progress(str(recipe))
        diagnosis.recipe = str(recipe)
        _judge(recipe, diagnosis)
    return diagnosis


# ---- the machine ----------------------------------------------------------------------------


def versions() -> dict[str, str | None]:
    """Versions of Python, this package and the packages it works with."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in (DISTRIBUTION, *PACKAGES):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def unsupported_versions(found: Mapping[str, str | None]) -> list[str]:
    """Which installed packages are not of a version that this package is made for."""
    from packaging.requirements import Requirement

    problems = []
    for line in requires(DISTRIBUTION) or ():
        wanted = Requirement(line)
        installed = found.get(wanted.name)
        if wanted.marker is None and installed and not wanted.specifier.contains(installed, True):
            problems.append(
                f"{wanted.name} {installed} is installed; this package is made for "
                f'{wanted.specifier}: pip install "{wanted.name}{wanted.specifier}"'
            )
    return problems


def this_device() -> dict[str, Any]:
    """What training would run on: a CUDA (or ROCm) GPU, else the CPU."""
    import torch

    if not torch.cuda.is_available():
        return {
            "kind": "cpu",
            "name": platform.processor() or platform.machine(),
            "count": os.cpu_count(),
            "memory": None,
            "bf16": False,
        }
    properties = torch.cuda.get_device_properties(0)
    return {
        "kind": "cuda",
        "name": properties.name,
        "count": torch.cuda.device_count(),
        "memory": round(properties.total_memory / 2**30, 1),
        "bf16": torch.cuda.is_bf16_supported(),
    }


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
    for launcher in ("deepspeed", "fsdp"):
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


def try_launcher(launcher: str) -> str:
    """One step under DeepSpeed or FSDP2 in a process of its own."""
    if launcher == "deepspeed":
        _need("deepspeed")
    command = [sys.executable, "-m", "longlora_plugin.distributed_trial", launcher]
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


# ---- the recipe -----------------------------------------------------------------------------


def _judge(path: Path, diagnosis: Diagnosis) -> None:
    from longlora_plugin.lowering import asks_for_longlora
    from longlora_plugin.recipe import read_yaml
    from longlora_plugin.recipes.check import check_recipe

    report = check_recipe(path)
    diagnosis.problems += report.problems
    diagnosis.notes += report.notes
    try:
        raw = read_yaml(path)
    except ValueError:
        return  # the report says so
    if not asks_for_longlora(raw):
        diagnosis.findings.append(
            Finding(
                "LongLoRA", False, "the recipe has neither adapter: longlora nor a longlora: block"
            )
        )
    diagnosis.findings += [*_findings(raw, report.resolved), *_launcher(raw)]
    diagnosis.problems += list(_unsupported_here(raw, diagnosis))


def _findings(raw: Mapping[str, Any], resolved: Mapping[str, Any]) -> Iterator[Finding]:
    """What is on and what is off; nothing where the recipe is wrong."""
    from longlora_plugin import lowering
    from longlora_plugin.args import parse_block

    if not resolved:
        return
    from longlora_plugin.host import base_config
    from longlora_plugin.rope import rope_parameters_of

    block = parse_block(raw.get("longlora"))
    base = base_config(raw)
    before, after = rope_parameters_of(base), resolved["rope_parameters"]
    original, target = resolved["original_context"], resolved["target_context"]
    if before != after:
        yield Finding("RoPE", True, f"{before} → {after}, context {original} → {target}")
    else:
        why = (
            "rope: none"
            if block.rope_preset == "none"
            else f"sequence_len: {target} is not above the context"
        )
        yield Finding("RoPE", False, f"{why}; stays {before}")

    model = _model(base, raw)
    yield from _attention_findings(raw, block, resolved, model)
    adapter = raw.get("adapter")
    if not adapter:
        yield Finding("adapter", False, "full fine-tune: every weight is trained")
    elif adapter == "longlora":
        keys = {**lowering.adapter_keys(raw), **{k: v for k, v in raw.items() if k != "adapter"}}
        targets = keys.get("lora_target_modules") or "every linear layer"
        yield Finding(
            "adapter",
            True,
            f"longlora → {resolved['adapter']}: r {keys['lora_r']}, alpha {keys['lora_alpha']}, "
            f"on {targets if isinstance(targets, str) else ', '.join(targets)}",
        )
        yield _trained_beside(raw, block, model)
    else:
        yield Finding("adapter", True, f"{adapter}, as Axolotl makes it")
        yield Finding("embeddings and norms", False, "trained with adapter: longlora only")
    for key, name in (("load_in_4bit", "4-bit base (NF4)"), ("load_in_8bit", "8-bit base")):
        if raw.get(key):
            yield Finding(name, True, f"{key}: true; embeddings and norms are not quantized")


def _model(base: Any, raw: Mapping[str, Any]) -> Any:
    from longlora_plugin.plan import meta_model

    try:
        return meta_model(base, trust_remote_code=raw.get("trust_remote_code") is True)
    except Exception:
        return None  # the report's notes say why


def _attention_findings(
    raw: Mapping[str, Any], block: Any, resolved: Mapping[str, Any], model: Any
) -> Iterator[Finding]:
    from longlora_plugin import lowering
    from longlora_plugin.attention.eligibility import eligible_layers

    implementation = lowering.attention_implementation(raw)
    if not resolved["group_size"]:
        yield Finding("shifted attention", False, "longlora: {shifted_attention: false}")
        return
    pattern = "" if block.attention_pattern == "s2" else f" ({block.attention_pattern})"
    layers = "its attention layers"
    skipped: Mapping[str, int] = {}
    if model is not None:
        covered, skipped = eligible_layers(model)
        layers = f"{len(covered)} layers"
    yield Finding(
        f"shifted attention{pattern}",
        True,
        f"{layers}, group size {resolved['group_size']} of {resolved['target_context']} tokens, "
        f"on {implementation}; in training only",
    )
    for reason, count in skipped.items():
        yield Finding("shifted attention", False, f"in {count} layers: {reason}")
    if block.full_attention_steps:
        steps = block.full_attention_steps
        yield Finding(
            "full attention at the end",
            True,
            f"the last {f'{steps:.0%}' if steps < 1 else int(steps)} of the steps",
        )


def _trained_beside(raw: Mapping[str, Any], block: Any, model: Any) -> Finding:
    from longlora_plugin.hooks import find

    what = "embeddings and norms"
    if not block.trainable:
        return Finding(what, False, "longlora: {trainable: []}")
    kinds = ", ".join(block.trainable)
    if model is None:
        return Finding(what, True, kinds)
    modules = dict(model.named_modules())
    names = {
        name
        for kind in block.trainable
        for name in find("longlora_trainable_modules", kind, what="kind of trainable modules")(
            model
        )
    }
    parameters = sum(p.numel() for name in names for p in modules[name].parameters())
    if raw.get("bf16") or raw.get("fp16"):
        masters = "fp32 masters, computing in the run's 16 bits"
        if raw.get("deepspeed"):
            masters = "fp32 masters in DeepSpeed's optimizer, saved whole"
    else:
        masters = "in the run's own dtype"
    return Finding(
        what, True, f"{kinds}: {len(names)} modules, {parameters:,} parameters, {masters}"
    )


def _launcher(raw: Mapping[str, Any]) -> Iterator[Finding]:
    if raw.get("deepspeed"):
        yield Finding("DeepSpeed", True, f"deepspeed: {raw['deepspeed']}")
    elif raw.get("fsdp_config") or raw.get("fsdp"):
        yield Finding("FSDP", True, f"fsdp_config: {raw.get('fsdp_config') or raw['fsdp']}")
    else:
        yield Finding(
            "DeepSpeed, FSDP", False, "the recipe has neither key: one process, or DDP on several"
        )
    if raw.get("sample_packing"):
        yield Finding("packing", True, "sample_packing: packed documents never see each other")


def _unsupported_here(raw: Mapping[str, Any], diagnosis: Diagnosis) -> Iterator[str]:
    """Why this machine cannot run a recipe, whatever the recipe itself is worth."""
    from longlora_plugin.lowering import attention_implementation

    trials = {trial.name: trial for trial in diagnosis.trials}
    for name, key, instead in _needed(raw, attention_implementation(raw)):
        trial = trials.get(name)
        if trial is None:
            continue
        if trial.state == NOT_TRIED:
            diagnosis.notes.append(f"{key} needs {name}, which was not tried")
        elif trial.state != WORKS:
            yield f"{key}: {name} does not work here ({trial.detail}); {instead}"
    gpu = diagnosis.device["kind"] == "cuda"
    if gpu:
        if raw.get("bf16") is True and not diagnosis.device["bf16"]:
            yield f"bf16: true: {diagnosis.device['name']} has no bf16; write fp16: true"
        return
    for key in ("deepspeed", "fsdp_config", "fsdp"):
        if raw.get(key):
            yield (
                f"{key}: Axolotl runs DeepSpeed and FSDP on GPUs, and this machine has none; "
                f"remove {key}"
            )
    if raw.get("adapter"):
        kernels = [key for key in LORA_KERNELS if raw.get(key) is not False]
        if kernels:
            yield (
                "Axolotl switches its LoRA kernels on by itself, and they need a GPU; write "
                + ", ".join(f"{key}: false" for key in kernels)
            )
    for key in ("bf16", "fp16"):
        if raw.get(key):
            yield f"{key}: {raw[key]}: half precision needs a GPU in Axolotl; write {key}: false"


def _needed(raw: Mapping[str, Any], implementation: str) -> Iterator[tuple[str, str, str]]:
    """(trial, the recipe's key, what to write instead) for all that a recipe needs."""
    yield (
        implementation,
        f"attn_implementation: {implementation}",
        "write attn_implementation: sdpa",
    )
    for bits in (4, 8):
        key = f"load_in_{bits}bit"
        if not raw.get(key):
            continue
        yield f"bitsandbytes {bits}-bit", f"{key}: true", f"remove {key}"
        if raw.get("val_set_size") or raw.get("test_datasets"):
            yield (
                f"bitsandbytes {bits}-bit{AFTER_EVALUATION}",
                f"{key}: true with evaluations",
                "write val_set_size: 0, or use a 16-bit base",
            )
    if raw.get("deepspeed"):
        yield "deepspeed", f"deepspeed: {raw['deepspeed']}", "or remove deepspeed"
    if raw.get("fsdp_config") or raw.get("fsdp"):
        yield "fsdp", "fsdp_config", "or remove it"

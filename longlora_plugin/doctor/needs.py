"""What a recipe comes to on this machine: what is on, what is off, and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longlora_plugin.doctor.trials import AFTER_EVALUATION, NOT_TRIED, WORKS, Trial

LORA_KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel")


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
class Judgement:
    """What was found about a recipe.

    Attributes:
        findings: what is on and what is off in it.
        problems: why it cannot run here; none where it can.
        notes: what else to know.
    """

    findings: list[Finding] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def judge(path: Path, trials: Sequence[Trial], device: Mapping[str, Any]) -> Judgement:
    """Check a recipe, and hold what it needs against what was tried on this machine.

    Args:
        path: a YAML file.
        device: of `machine.this_device`.
    """
    from longlora_plugin.recipes.check import check_recipe
    from longlora_plugin.run.prepare import asks_for_longlora
    from longlora_plugin.run.recipe import read_yaml

    report = check_recipe(path)
    found = Judgement(problems=list(report.problems), notes=list(report.notes))
    try:
        raw = read_yaml(path)
    except ValueError:
        return found  # the report says so
    if not asks_for_longlora(raw):
        found.findings.append(
            Finding(
                "LongLoRA", False, "the recipe has neither adapter: longlora nor a longlora: block"
            )
        )
    found.findings += [*_findings(raw, report.resolved), *_launcher(raw)]
    lacking, untried = _lacking(raw, trials)
    found.notes += untried
    found.problems += [*lacking, *_unsupported_here(raw, device)]
    return found


def _findings(raw: Mapping[str, Any], resolved: Mapping[str, Any]) -> Iterator[Finding]:
    """What is on and what is off; nothing where the recipe is wrong."""
    from longlora_plugin.args import parse_block

    if not resolved:
        return
    from longlora_plugin.rope import rope_parameters_of
    from longlora_plugin.run.axolotl_keys import adapter_keys
    from longlora_plugin.run.base_model import base_config_of

    block = parse_block(raw.get("longlora"))
    base = base_config_of(raw)
    before, after = rope_parameters_of(base), resolved["rope_parameters"]
    original, target = resolved["base_context"], resolved["target_context"]
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
        keys = {**raw, **adapter_keys(raw)}
        targets = keys.get("lora_target_modules") or "every linear layer"
        yield Finding(
            "adapter",
            True,
            f"longlora → {keys['adapter']}: r {keys['lora_r']}, alpha {keys['lora_alpha']}, "
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
    from longlora_plugin.attention.eligibility import eligible_layers
    from longlora_plugin.run.axolotl_keys import attention_implementation

    implementation = attention_implementation(raw)
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
    from longlora_plugin.registry import find

    what = "embeddings and norms"
    if not block.trainable:
        return Finding(what, False, "longlora: {trainable: []}")
    kinds = ", ".join(block.trainable)
    if model is None:
        return Finding(what, True, kinds)
    modules = dict(model.named_modules())
    names = {
        name for kind in block.trainable for name in find("longlora_trainable_modules", kind)(model)
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


def _lacking(raw: Mapping[str, Any], trials: Sequence[Trial]) -> tuple[list[str], list[str]]:
    """(what the recipe needs and was seen not to work, what it needs and was not tried)."""
    from longlora_plugin.run.axolotl_keys import attention_implementation

    lacking, untried = [], []
    of_name = {trial.name: trial for trial in trials}
    for name, key, instead in _needed(raw, attention_implementation(raw)):
        trial = of_name.get(name)
        if trial is None:
            continue
        if trial.state == NOT_TRIED:
            untried.append(f"{key} needs {name}, which was not tried")
        elif trial.state != WORKS:
            lacking.append(f"{key}: {name} does not work here ({trial.detail}); {instead}")
    return lacking, untried


def _unsupported_here(raw: Mapping[str, Any], device: Mapping[str, Any]) -> Iterator[str]:
    """Why this device cannot run a recipe, whatever the recipe itself is worth."""
    if device["kind"] == "cuda":
        if raw.get("bf16") is True and not device["bf16"]:
            yield f"bf16: true: {device['name']} has no bf16; write fp16: true"
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

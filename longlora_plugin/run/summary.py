"""What a run comes to, in words: training logs these facts, `recipes check` and `doctor` print
them; and what it has come to, at its end.

A fact is said from the run's decisions, and from what only the built model knows: which layers
S²-Attn covers, and which modules train in addition to LoRA.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from longlora_plugin.artifacts.manifest import Manifest
from longlora_plugin.run.axolotl_keys import attention_implementation
from longlora_plugin.run.prepare import PreparedRun


@dataclass(frozen=True)
class Fact:
    """One thing about a run.

    Attributes:
        what: for example `RoPE`.
        on: whether it will be.
        why: how, or why not.
    """

    what: str
    on: bool
    why: str

    def __str__(self) -> str:
        return f"{self.what}: {self.why}" if self.on else f"{self.what}: off, {self.why}"


@dataclass(frozen=True)
class Built:
    """What only the built model knows.

    Attributes:
        layers: number of attention layers that S²-Attn covers.
        skipped: reason → number of attention layers that keep the model's own attention.
        modules: number of modules trained in addition to LoRA.
        parameters: number of their parameters.
        precision: of these, where the model has weights.
        targets: modules with LoRA, as PEFT is told; empty where the recipe decides.
    """

    layers: int = 0
    skipped: Mapping[str, int] = field(default_factory=dict)
    modules: int = 0
    parameters: int = 0
    precision: str = ""
    targets: str | Sequence[str] = ()

    @classmethod
    def of(cls, handle: Any, trained: Any, targets: str | Sequence[str] | None) -> Built:
        """Of a model that is ready to train.

        Args:
            handle: of its shifted attention, a `ShiftedAttention`, if it has that.
            trained: the `TrainedModules` in addition to LoRA, if there are any.
        """
        layers, skipped = (handle.layers, dict(handle.skipped)) if handle else (0, {})
        if trained is None:
            return cls(layers, skipped, targets=targets or ())
        precision = f"kept in {trained.dtype}, computing in {trained.compute_dtype}"
        precision = precision.replace("torch.", "")
        return cls(layers, skipped, trained.modules, trained.parameters, precision, targets or ())


def facts(run: PreparedRun, built: Built | None = None) -> list[Fact]:
    """Everything about a run that is right; nothing where something is wrong with it.

    Args:
        built: None where the model cannot be built.
    """
    if run.problems or run.rope is None:
        return []
    return [*rope_facts(run), *built_facts(run, built), *launch_facts(run)]


def rope_facts(run: PreparedRun) -> Iterator[Fact]:
    """How RoPE is scaled."""
    before = dict(run.rope_before)
    if run.rope is not None and run.rope_fields:
        reason = f" (auto: {run.rope.chosen_by_auto})" if run.rope.chosen_by_auto else ""
        yield Fact(
            "RoPE",
            True,
            f"{run.rope.preset}{reason}, {before} → {run.rope.rope_parameters}, "
            f"context {run.base_context} → {run.target_context}",
        )
        return
    why = f"sequence_len: {run.target_context} is not above the context"
    if run.block.rope_preset == "none":
        why = "rope: none"
    if run.rope is not None:
        before = dict(run.rope.rope_parameters)  # of the recipe's own model_config, too
    yield Fact("RoPE", False, f"{why}; stays {before}")


def built_facts(run: PreparedRun, built: Built | None) -> Iterator[Fact]:
    """How the model attends while it trains, and what of it trains."""
    yield from _attention(run, built)
    keys = {**run.recipe, **run.updates}
    if not run.adapter:
        yield Fact("adapter", False, "full fine-tune: every weight is trained")
    elif run.adapter == "longlora":
        targets = (built.targets if built else ()) or keys.get("lora_target_modules")
        targets = targets or "every linear layer"
        yield Fact(
            "adapter",
            True,
            f"longlora → {keys['adapter']}: r {keys['lora_r']}, alpha {keys['lora_alpha']}, "
            f"on {targets if isinstance(targets, str) else ', '.join(targets)}",
        )
        yield _trained(run, built)
    else:
        yield Fact("adapter", True, f"{run.adapter}, as Axolotl makes it")
        yield Fact("embeddings and norms", False, "trained with adapter: longlora only")
    for key, name in (("load_in_4bit", "4-bit base (NF4)"), ("load_in_8bit", "8-bit base")):
        if keys.get(key):
            yield Fact(name, True, f"{key}: true; embeddings and norms are not quantized")


def _attention(run: PreparedRun, built: Built | None) -> Iterator[Fact]:
    if not run.group_size:
        yield Fact("shifted attention", False, "longlora: {shifted_attention: false}")
        return
    layers = f"{built.layers} layers" if built else "its attention layers"
    yield Fact(
        f"shifted attention ({run.block.attention_pattern})",
        True,
        f"{layers}, group size {run.group_size} of {run.target_context} tokens, on "
        f"{attention_implementation(run.recipe)}; in training only",
    )
    for reason, count in (built.skipped if built else {}).items():
        yield Fact("shifted attention", False, f"in {count} layers: {reason}")
    steps = run.block.full_attention_steps
    if steps:
        share = f"{steps:.0%}" if steps < 1 else str(int(steps))
        yield Fact("full attention at the end", True, f"the last {share} of the steps")


def _trained(run: PreparedRun, built: Built | None) -> Fact:
    what = "trained in addition to LoRA"
    if not run.trainable:
        return Fact(what, False, "longlora: {trainable: []}")
    kinds = ", ".join(run.trainable)
    if built is None:
        return Fact(what, True, kinds)
    precision = built.precision
    if not precision and (run.recipe.get("bf16") or run.recipe.get("fp16")):
        precision = "fp32 masters, computing in the run's 16 bits"
        if run.recipe.get("deepspeed"):
            precision = "fp32 masters in DeepSpeed's optimizer, saved whole"
    return Fact(
        what,
        True,
        f"{kinds}: {built.modules} modules, {built.parameters:,} parameters, "
        + (precision or "in the run's own dtype"),
    )


def launch_facts(run: PreparedRun) -> Iterator[Fact]:
    """How the run is spread over processes, and how its rows are made."""
    recipe = run.recipe
    fsdp = recipe.get("fsdp_config") or recipe.get("fsdp")
    if recipe.get("deepspeed"):
        yield Fact("DeepSpeed", True, f"deepspeed: {recipe['deepspeed']}")
    elif fsdp:
        yield Fact("FSDP", True, f"fsdp_config: {fsdp}")
    else:
        yield Fact(
            "DeepSpeed, FSDP", False, "the recipe has neither key: one process, or DDP on several"
        )
    if run.context_parallel > 1:
        shard = -(-run.target_context // run.context_parallel)
        yield Fact(
            "context parallelism",
            True,
            f"{run.context_parallel} GPUs share a row: {shard} tokens each",
        )
    if recipe.get("sample_packing"):
        yield Fact("packing", True, "sample_packing: packed documents never see each other")


def closing_block(manifest: Manifest, folder: str, recipe: str | None) -> str:
    """The lines that end a run: what was trained, where it is, and the commands that come next.

    Args:
        folder: the run's `output_dir`.
        recipe: its file; None where Axolotl did not say.
    """
    recipe = recipe or "RECIPE.yml"
    measured_on = manifest.recipe.get("test_datasets") or (
        (manifest.recipe.get("longlora") or {}).get("held_out")
    )
    evaluate = f"longlora eval {recipe}" + ("" if measured_on else " --data BOOK.txt")
    merge = [f"axolotl merge-lora {recipe}"] if manifest.adapter else []
    served = f"{folder}/merged" if manifest.adapter else folder
    lines = {
        "trained": _what_trained(manifest),
        "saved in": folder,
        "context": _context_of(manifest),
        "steps": _steps_of(manifest),
        "next": "\n            ".join([evaluate, *merge, f"longlora serve-check {served}"]),
    }
    return "LongLoRA: the run is finished\n" + "\n".join(
        f"  {name:<10}{text}" for name, text in lines.items()
    )


def _what_trained(manifest: Manifest) -> str:
    if not manifest.adapter:
        return f"the whole of {manifest.base_model}"
    if not manifest.trained_modules:
        return f"a LoRA adapter of {manifest.base_model}"
    return (
        f"a LoRA adapter of {manifest.base_model} and {manifest.trained_modules} modules "
        f"({', '.join(manifest.trainable)}; {manifest.trained_parameters:,} parameters)"
    )


def _steps_of(manifest: Manifest) -> str:
    full = manifest.full_attention_steps if manifest.group_size else manifest.steps
    kinds = {
        f"shifted attention (groups of {manifest.group_size or 0:,})": manifest.steps - full,
        "full attention": full,
    }
    return ", then ".join(f"{count:,} with {kind}" for kind, count in kinds.items() if count)


def _context_of(manifest: Manifest) -> str:
    if not manifest.config_fields:
        return f"{manifest.base_context or manifest.target_context:,} tokens, RoPE unchanged"
    before = f"{manifest.base_context:,}" if manifest.base_context else "unknown"
    return f"{before} → {manifest.target_context:,} tokens, RoPE {manifest.rope_preset}"

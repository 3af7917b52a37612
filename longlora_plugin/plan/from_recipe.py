"""What of a recipe bears on cost: from Axolotl's YAML keys to the plain values of `memory` and
`parameters`. Keys that say nothing here are left to Axolotl's defaults.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longlora_plugin.args import LongLoRAConfig
from longlora_plugin.plan.memory import OPTIMIZERS, Training
from longlora_plugin.plan.parameters import Parameters, count_parameters
from longlora_plugin.run.axolotl_keys import (
    LORA_DEFAULTS,
    LORA_TARGETS,
    attention_implementation,
)
from longlora_plugin.run.recipe import Recipe

DEEPSPEED_BUCKET = int(5e8)
DEEPSPEED_LIVE = int(1e9)
"""DeepSpeed's defaults for `reduce_bucket_size` and `stage3_max_live_parameters`."""
NOT_MODELLED = ("tensor_parallel_size", "context_parallel_size", "expert_parallel_size")


def parameters_of(recipe: Recipe, model: Any) -> Parameters:
    """Count what a recipe trains of `model` (weights or none).

    Raises:
        ValueError: LoRA's targets match nothing, or `trainable` names an unknown kind.
    """
    raw = recipe.raw
    if not recipe.adapter:
        return count_parameters(model, unfrozen=raw.get("unfrozen_parameters") or ())
    saved = list(raw.get("lora_modules_to_save") or ())
    targets: Any = raw.get("lora_target_modules") or ()
    fused = raw.get("lora_target_parameters") or ()
    if raw.get("lora_target_linear"):
        targets = "all-linear"
    if recipe.adapter == "longlora":
        from longlora_plugin.adapter.modules import attention_projections
        from longlora_plugin.registry import find

        assert recipe.block is not None
        for kind in recipe.block.trainable:
            saved += find("longlora_trainable_modules", kind, what="kind of trainable modules")(
                model
            )
        if not targets and not fused:
            names = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
            known = names.intersection(LORA_TARGETS)
            targets = LORA_TARGETS if known else attention_projections(model)
    return count_parameters(
        model,
        lora_r=int(raw.get("lora_r") or LORA_DEFAULTS["lora_r"]),
        target_modules=targets,
        target_parameters=[fused] if isinstance(fused, str) else fused,
        dora=bool(raw.get("peft_use_dora")),
        saved_modules=saved,
    )


def training_of(recipe: Recipe, gpus: int) -> tuple[Training, tuple[str, ...]]:
    """What bears on a recipe's memory, and notes on what had to be assumed.

    Raises:
        ValueError: the DeepSpeed file is neither there nor known by its name, or a wrong value.
    """
    raw = recipe.raw
    notes: list[str] = []
    optimizer, temporaries = _optimizer(str(raw.get("optimizer") or "adamw_torch_fused"), notes)
    checkpointing = raw.get("gradient_checkpointing") or False
    fsdp = raw.get("fsdp_config") or {}
    offloaded = str(checkpointing).startswith("offload") or bool(raw.get("activation_offloading"))
    attention, own = attention_of(recipe), uses_own_attention(recipe)
    values: dict[str, Any] = {
        "sequence_len": recipe.sequence_len,
        "micro_batch_size": int(raw.get("micro_batch_size") or 1),
        "gpus": gpus,
        "compute_bytes": 2 if raw.get("bf16", "auto") or raw.get("fp16") else 4,
        "quantization": _quantization(recipe),
        "checkpointing": bool(checkpointing or fsdp.get("activation_checkpointing")),
        "offload_activations": offloaded,
        "optimizer": optimizer,
        "optimizer_temporaries": temporaries,
        "loss": _loss(raw),
        "shifted_copies": attention == "sdpa" and uses_shifted_attention(recipe),
        "dense_mask": own and attention in ("sdpa", "eager") and bool(raw.get("sample_packing")),
    }
    if raw.get("deepspeed"):
        values |= _deepspeed(raw["deepspeed"], recipe.path.parent, notes)
    elif raw.get("fsdp_config") or raw.get("fsdp"):
        values |= _fsdp(fsdp, raw.get("fsdp") or [])
    for key in NOT_MODELLED:
        if int(raw.get(key) or 1) > 1:
            notes.append(
                f"{key}: {raw[key]} is not modelled; every GPU is planned as data-parallel"
            )
    return Training(**values), tuple(notes)


def uses_shifted_attention(recipe: Recipe) -> bool:
    """Whether the recipe trains with S²-Attn."""
    return recipe.block is not None and recipe.block.shifted_attention


def uses_own_attention(recipe: Recipe) -> bool:
    """Whether any training step uses the model's own attention over whole rows."""
    return not uses_shifted_attention(recipe) or block_of(recipe).full_attention_steps > 0


def attention_of(recipe: Recipe) -> str:
    """`eager`, `sdpa` or `flash` (any kernel that needs neither scores nor a dense mask)."""
    name = attention_implementation(recipe.raw)
    return name if name in ("eager", "sdpa") else "flash"


def _quantization(recipe: Recipe) -> str | None:
    if not recipe.adapter:
        return None
    if recipe.raw.get("load_in_4bit"):
        return "nf4"
    return "int8" if recipe.raw.get("load_in_8bit") else None


def _loss(raw: Mapping[str, Any]) -> str:
    cut = any(str(name).endswith("CutCrossEntropyPlugin") for name in raw.get("plugins") or ())
    if raw.get("liger_fused_linear_cross_entropy") or (cut and raw.get("cut_cross_entropy", True)):
        return "fused"
    return "chunked" if raw.get("chunked_cross_entropy") else "full"


def _optimizer(name: str, notes: list[str]) -> tuple[str, int]:
    low = name.lower()
    bits = "_8bit" if "8bit" in low else "_4bit" if "4bit" in low else ""
    kind = next((k for k in sorted(OPTIMIZERS, key=len, reverse=True) if k in low), None)
    if kind is None:
        notes.append(f"optimizer: {name} is not known here; planned as adamw_torch")
        return "adamw", 1
    kind = kind.removesuffix("_8bit").removesuffix("_4bit") + bits
    if kind not in OPTIMIZERS:
        kind = kind.removesuffix(bits)
    # torch's default loop over parameter lists holds one temporary list; fused kernels hold none.
    return kind, 1 if low == "adamw_torch" else 0


def _deepspeed(value: Any, folder: Path, notes: list[str]) -> dict[str, Any]:
    config = value
    if not isinstance(value, Mapping):
        found = next((p for p in (Path(value), folder / value) if p.is_file()), None)
        config = json.loads(found.read_text(encoding="utf-8")) if found else _by_name(value, notes)
    zero = config.get("zero_optimization") or {}
    stage = int(zero.get("stage") or 0)
    bucket = zero.get("reduce_bucket_size", DEEPSPEED_BUCKET)
    live = zero.get("stage3_max_live_parameters", zero.get("max_live_parameters", DEEPSPEED_LIVE))
    overlaps = zero.get("overlap_comm", stage == 3) is True and stage < 3
    return {
        "engine": "deepspeed",
        "zero_stage": stage,
        "offload_optimizer": _on_cpu(zero.get("offload_optimizer")),
        "offload_weights": _on_cpu(zero.get("offload_param")),
        "bucket_elements": None if bucket == "auto" else int(float(bucket)),
        "buckets": 0 if stage == 0 else 2 if overlaps else 1,
        "live_elements": DEEPSPEED_LIVE if live == "auto" else int(float(live)),
    }


def _by_name(value: str, notes: list[str]) -> dict[str, Any]:
    name = Path(value).name
    match = re.fullmatch(
        r"zero([123])(?:_bf16)?(?:_torch_compile)?(_cpuoffload(?:_\w+)?)?\.json", name
    )
    if not match:
        raise ValueError(
            f"deepspeed: {value} does not exist here and is not named like one of Axolotl's own "
            "files (zero1.json, zero2.json, zero3_bf16.json, zero3_bf16_cpuoffload_all.json); "
            "write the path of a file, or run: axolotl fetch deepspeed_configs"
        )
    stage, offload = int(match[1]), match[2] or ""
    notes.append(
        f"deepspeed: {value} does not exist here; planned by its name as ZeRO-{stage}"
        + (", offload to the CPU" if offload else " without offload to the CPU")
    )
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": True}
    if stage == 3:
        zero |= {"reduce_bucket_size": "auto", "max_live_parameters": 0}
    if offload:
        zero["offload_param"] = {"device": "cpu"}
        if not offload.endswith("_params"):
            zero["offload_optimizer"] = {"device": "cpu"}
    return {"zero_optimization": zero}


def _on_cpu(offload: Any) -> bool:
    return isinstance(offload, Mapping) and offload.get("device", "cpu") in ("cpu", "nvme")


def _fsdp(config: Mapping[str, Any], legacy: Any) -> dict[str, Any]:
    words = f"{legacy} {config.get('fsdp_sharding_strategy', config.get('sharding_strategy', ''))}"
    reshard = config.get("reshard_after_forward", config.get("fsdp_reshard_after_forward", True))
    stage = 3
    if "no_shard" in words.lower():
        stage = 0
    elif "shard_grad_op" in words.lower() or reshard is False or "grad_op" in str(reshard).lower():
        stage = 2
    offload = config.get("offload_params", config.get("fsdp_offload_params", False)) is True
    return {
        "engine": "fsdp",
        "zero_stage": stage,
        "offload_optimizer": offload,
        "offload_weights": offload,
    }


def block_of(recipe: Recipe) -> LongLoRAConfig:
    """The recipe's `longlora:` block, or the one an empty block would be."""
    return recipe.block or LongLoRAConfig()

"""The part of a recipe that decides its cost: from Axolotl's YAML keys to the plain values of
`memory` and `parameters`. Keys that say nothing here are left to Axolotl's defaults.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longlora_plugin.args import LongLoRAConfig
from longlora_plugin.checkpoints.files import read_json
from longlora_plugin.plan.cost import STEPS, Steps
from longlora_plugin.plan.memory import OPTIMIZERS, Training
from longlora_plugin.plan.parameters import Parameters, count_parameters
from longlora_plugin.plan.remedies import MLP_TILE
from longlora_plugin.plan.shape import ModelShape, meta_model
from longlora_plugin.run.axolotl_keys import LORA_DEFAULTS, attention_implementation
from longlora_plugin.run.base_model import plain_config_of
from longlora_plugin.run.built import adapter_keys_of
from longlora_plugin.run.context_parallel import context_parallel_size
from longlora_plugin.run.prepare import PreparedRun, prepare_run
from longlora_plugin.run.recipe import Recipe

DEEPSPEED_BUCKET = int(5e8)
DEEPSPEED_LIVE = int(1e9)
"""DeepSpeed's defaults for `reduce_bucket_size` and `stage3_max_live_parameters`."""
VARLEN_HEAD_DIM = 256
"""Widest head of torch's varlen attention."""
NOT_MODELLED = ("tensor_parallel_size", "expert_parallel_size")


def model_of(recipe: Recipe, config: Any) -> tuple[PreparedRun, Any]:
    """The run of a recipe, and the model it trains, without weights.

    Args:
        config: the base model's transformers config.

    Raises:
        ValueError: says everything that is wrong with the recipe.
    """
    run = prepare_run(recipe.raw, config).checked()
    return run, meta_model(run.config_of(config), trust_remote_code=run.remote_code)


def base_config_of(recipe: Recipe) -> Any:
    """The base model's config, as light as this recipe allows.

    Options of RoPE are judged by transformers' class, and kinds of modules that a package provides
    by transformers' modules.
    """
    block = block_of(recipe)
    light = not block.rope_options and set(block.trainable) <= {"embeddings", "norms"}
    return (light and plain_config_of(recipe.raw)) or recipe.base_config()


def parameters_of(run: PreparedRun, model: Any) -> Parameters:
    """Count what a run trains of `model` (weights or none).

    Raises:
        ValueError: LoRA's targets match nothing.
    """
    raw = {**run.recipe, **run.updates}
    if not run.adapter:
        return count_parameters(model, unfrozen=raw.get("unfrozen_parameters") or ())
    if run.adapter == "longlora":
        raw |= adapter_keys_of(run, model, raw)[0]
    targets = "all-linear" if raw.get("lora_target_linear") else raw.get("lora_target_modules")
    fused = raw.get("lora_target_parameters") or ()
    return count_parameters(
        model,
        lora_r=int(raw.get("lora_r") or LORA_DEFAULTS["lora_r"]),
        target_modules=targets or (),
        target_parameters=[fused] if isinstance(fused, str) else fused,
        dora=bool(raw.get("peft_use_dora")),
        saved_modules=raw.get("lora_modules_to_save") or (),
    )


def training_of(
    recipe: Recipe, gpus: int, shape: ModelShape | None = None
) -> tuple[Training, tuple[str, ...]]:
    """What bears on a recipe's memory, and notes on what had to be assumed.

    Args:
        gpus: GPUs of the run.
        shape: of the model; None leaves out what depends on it.

    Raises:
        ValueError: the DeepSpeed file is neither there nor known by its name, or a wrong value.
    """
    raw = recipe.raw
    notes: list[str] = []
    optimizer, temporaries = _optimizer(str(raw.get("optimizer") or "adamw_torch_fused"), notes)
    checkpointing = raw.get("gradient_checkpointing") or False
    fsdp = raw.get("fsdp_config") or {}
    offloading = raw.get("activation_offloading") or str(checkpointing).startswith("offload")
    # With an adapter Axolotl offloads instead of recomputing, unless hidden_states are asked for.
    recomputes = not offloading or offloading == "hidden_states" or not recipe.adapter
    attention, own = attention_of(recipe), uses_own_attention(recipe)
    values: dict[str, Any] = {
        "sequence_len": recipe.sequence_len,
        "micro_batch_size": int(raw.get("micro_batch_size") or 1),
        "gpus": gpus,
        "compute_bytes": 2 if raw.get("bf16", "auto") or raw.get("fp16") else 4,
        "quantization": _quantization(recipe),
        "context_parallel": context_parallel_size(raw),
        "checkpointing": bool(checkpointing or fsdp.get("activation_checkpointing")) and recomputes,
        "offload_activations": bool(offloading),
        "offload_layers": bool(raw.get("layer_offloading")),
        "optimizer": optimizer,
        "optimizer_temporaries": temporaries,
        "loss": _loss(raw),
        "loss_chunks": int(raw.get("chunked_cross_entropy_num_chunks") or 8),
        "shifted_copies": attention == "sdpa" and uses_shifted_attention(recipe),
    }
    values["dense_mask"] = own and _packed_mask(raw, attention, shape, values["compute_bytes"])
    if gpus % values["context_parallel"]:
        raise ValueError(
            f"context_parallel_size: {values['context_parallel']} does not divide the {gpus} GPUs "
            "of the plan; write --gpus with a multiple of it"
        )
    values["mlp_tiles"] = _mlp_tiles(raw, Training(**values).tokens)
    if raw.get("deepspeed"):
        values |= _deepspeed(raw["deepspeed"], recipe.path.parent, notes)
    elif raw.get("fsdp_config") or raw.get("fsdp"):
        values |= _fsdp(fsdp, raw.get("fsdp") or [])
    if raw.get("selective_checkpointing"):
        notes.append(
            "selective_checkpointing: the attention outputs it keeps are not in the memory below: "
            "the size of a layer's input for each layer"
        )
    for key in NOT_MODELLED:
        if int(raw.get(key) or 1) > 1:
            notes.append(
                f"{key}: {raw[key]} is not modelled; every GPU is planned as data-parallel"
            )
    return Training(**values), tuple(notes)


def _mlp_tiles(raw: Mapping[str, Any], tokens: int) -> int:
    if not raw.get("tiled_mlp"):
        return 1
    return int(raw.get("tiled_mlp_num_shards") or -(-tokens // MLP_TILE))


def steps_of(recipe: Recipe, training: Training, rows: int | None = None) -> Steps:
    """How many steps a run has, and of how many rows each.

    Args:
        rows: rows of the dataset, where they are known.
    """
    raw = recipe.raw
    accumulation = int(raw.get("gradient_accumulation_steps") or 1)
    a_step = training.data_parallel * training.micro_batch_size * accumulation
    if raw.get("max_steps"):
        return Steps(int(raw["max_steps"]), "max_steps", a_step)
    epochs = float(raw.get("num_epochs") or 1)
    if rows:
        count = max(1, math.ceil(epochs * rows / a_step))
        return Steps(count, f"{epochs:g} epochs of {rows:,} rows", a_step)
    return Steps(STEPS, f"{STEPS} steps: max_steps is not set, --rows not given", a_step, True)


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


def _packed_mask(
    raw: Mapping[str, Any], attention: str, shape: ModelShape | None, compute_bytes: int
) -> bool:
    """Whether packed rows get a dense N × N mask.

    On `sdpa` Axolotl takes torch's varlen kernel instead where it can: on a GPU in 16 bits, heads
    of one width up to VARLEN_HEAD_DIM, no sliding layers, and sdpa asked for by name.
    """
    if attention not in ("sdpa", "eager") or not raw.get("sample_packing"):
        return False
    named = bool(raw.get("attn_implementation") or raw.get("sdp_attention"))
    asked = raw.get("sdpa_varlen")
    varlen = attention == "sdpa" and compute_bytes == 2 and (named if asked is None else asked)
    if varlen and shape is not None:
        varlen = shape.head_dim <= VARLEN_HEAD_DIM and shape.head_dim == shape.value_dim
        varlen = varlen and shape.full_layers == len(shape.windows)
    return not varlen


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
        config = read_json(found) if found else _by_name(value, notes)
    zero = config.get("zero_optimization") or {}
    if not isinstance(zero, Mapping):
        raise ValueError(f"deepspeed: zero_optimization: got {zero!r}; write a block of keys")
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

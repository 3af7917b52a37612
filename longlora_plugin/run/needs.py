"""What a recipe needs of a machine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from longlora_plugin.run.axolotl_keys import attention_implementation
from longlora_plugin.run.context_parallel import package_that_cuts_rows, spellings_of

LORA_KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel")


class Need(NamedTuple):
    """One thing that has to work.

    Attributes:
        name: what `doctor` tries, for example `bitsandbytes 4-bit`.
        key: the recipe's key that asks for it, with its value.
        instead: what to write where it does not work.
        evaluated: whether it has to work after an evaluation, too.
    """

    name: str
    key: str
    instead: str
    evaluated: bool = False


def needs_of(recipe: Mapping[str, Any]) -> Iterator[Need]:
    """Everything that a raw recipe needs."""
    implementation = attention_implementation(recipe)
    yield Need(
        implementation,
        f"attn_implementation: {implementation}",
        "write attn_implementation: sdpa",
    )
    for bits in (4, 8):
        key, name = f"load_in_{bits}bit", f"bitsandbytes {bits}-bit"
        if not recipe.get(key):
            continue
        yield Need(name, f"{key}: true", f"remove {key}")
        if recipe.get("val_set_size") or recipe.get("test_datasets"):
            instead = "write val_set_size: 0, or use a 16-bit base"
            yield Need(name, f"{key}: true with evaluations", instead, evaluated=True)
    if recipe.get("deepspeed"):
        yield Need("deepspeed", f"deepspeed: {recipe['deepspeed']}", "or remove deepspeed")
    if recipe.get("fsdp_config") or recipe.get("fsdp"):
        yield Need("fsdp", "fsdp_config", "or remove it")
    for key, size in spellings_of(recipe).items():
        if str(size) != "1":
            names = ["context_parallel"]
            if not recipe.get("deepspeed"):
                names.append(package_that_cuts_rows())
            yield from (Need(name, f"{key}: {size}", f"or remove {key}") for name in names)


def unsupported_on(device: Mapping[str, Any], recipe: Mapping[str, Any]) -> Iterator[str]:
    """Why this device cannot run a recipe, whatever the recipe itself is worth.

    Args:
        device: `kind` (`cuda` or `cpu`), `name` and `bf16`.
    """
    if device["kind"] == "cuda":
        if recipe.get("bf16") is True and not device["bf16"]:
            yield f"bf16: true: {device['name']} has no bf16; write fp16: true"
        return
    for key in ("deepspeed", "fsdp_config", "fsdp"):
        if recipe.get(key):
            yield (
                f"{key}: Axolotl runs DeepSpeed and FSDP on GPUs, and this machine has none; "
                f"remove {key}"
            )
    if recipe.get("adapter"):
        kernels = [key for key in LORA_KERNELS if recipe.get(key) is not False]
        if kernels:
            yield (
                "Axolotl switches its LoRA kernels on by itself, and they need a GPU; write "
                + ", ".join(f"{key}: false" for key in kernels)
            )
    for key in ("bf16", "fp16"):
        if recipe.get(key):
            yield f"{key}: {recipe[key]}: half precision needs a GPU in Axolotl; write {key}: false"

"""Makers of a decoder family's entry in the table (`families.py`), and of its tiny model."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING, AutoConfig

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SLIDING, FULL, LINEAR = "sliding_attention", "full_attention", "linear_attention"
MIXED = {"layer_types": [SLIDING, FULL], "sliding_window": 6}
EXPERTS = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
DEEPSEEK_EXPERTS = {
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
LATENT = {  # DeepSeek's latent attention: heads of values are smaller than those of queries
    "head_dim": None,
    "num_key_value_heads": 4,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "q_lora_rank": 12,
    "kv_lora_rank": 10,
}
MAMBA = {
    "mamba_d_state": 8,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
}
DELTA_NET = {
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": [LINEAR, FULL],
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
QWEN_VISION = {
    "depth": 2,
    "hidden_size": 16,
    "embed_dim": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "patch_size": 4,
    "out_hidden_size": 32,
    "spatial_merge_size": 2,
    "window_size": 16,
    "fullatt_block_indexes": [1],
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
}
IMAGE_TOKENS = {
    "image_token_id": 3,
    "image_token_index": 3,
    "video_token_id": 4,
    "vision_start_token_id": 5,
    "vision_end_token_id": 6,
    "boi_token_index": 5,
    "eoi_token_index": 6,
}
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
MULTIMODAL_ROPE = {"rope_parameters": {**PLAIN_ROPE, "mrope_section": [2, 1, 1]}}
RECURRENT = "recurrent or convolution layers carry their state over"
NO_POSITIONS = "its sliding layers are not told of position_ids"
NO_ATTENTION = "linear attention layer has no attention that could be shifted"
CONVOLUTION = {"conv layer has no attention that could be shifted": 1}


@dataclass(frozen=True)
class Family:
    """A decoder family.

    Attributes:
        config: what its tiny config has besides `SIZES`; None removes one of those.
        full: indices of the layers with full attention, which S² must cover.
        skipped: what `handle.skipped` must say.
        heads, kv_heads: as the attention function gets them.
        modules, calls: attention modules to cover, and how often they attend in one forward pass,
            where that is not once for each layer of `full`.
        implementations: of attention that the family runs on and that keep its definition.
        packing: why the *stock* model mixes packed documents outside its full attention layers.
        shares_mask: its other layers are given the mask of the full-attention layers.
        auto: the class of transformers that builds the model.
        zeros: inputs that must be given, [rows, tokens] of zeros.
    """

    config: dict[str, Any] = field(default_factory=dict)
    full: tuple[int, ...] = (0, 1)
    skipped: dict[str, int] = field(default_factory=dict)
    heads: int = 4
    kv_heads: int = 2
    modules: int | None = None
    calls: int | None = None
    implementations: tuple[str, ...] = ("sdpa", "eager")
    packing: str = ""
    shares_mask: bool = False
    auto: str = "AutoModelForCausalLM"
    zeros: tuple[str, ...] = ()

    @property
    def layers(self) -> int:
        return self.modules or len(self.full)


def mixed(attention: str, config: dict[str, Any] | None = None, **options: Any) -> Family:
    """One layer with a window of 6 tokens, one with full attention."""
    return Family(
        {**MIXED, **(config or {})},
        full=(1,),
        skipped={f"{attention} has a sliding window of 6 tokens": 1},
        **options,
    )


def hybrid(config: dict[str, Any], **options: Any) -> Family:
    """One recurrent or convolution layer, one with full attention."""
    options = {"skipped": {NO_ATTENTION: 1}, "packing": RECURRENT, **options}
    return Family(config, full=(1,), **options)


def with_vision(model: Family, vision: str, **config: Any) -> Family:
    """The decoder `model` as the text model of a vision-language model."""
    text = {**SIZES, **model.config}
    vision_layers = config.get("vision_config", VISION).get("num_hidden_layers", 2)
    towers = {"text_config": text, "vision_config": VISION, **IMAGE_TOKENS, **config}
    return replace(
        model,
        config={**dict.fromkeys(SIZES), **towers},
        skipped={
            **({f"{vision} is not causal": vision_layers} if vision else {}),
            **model.skipped,
        },
        auto="AutoModelForImageTextToText",
    )


LATENT_DEEPSEEK = Family({**LATENT, **DEEPSEEK_EXPERTS}, kv_heads=4)


def tiny_config(name: str, family: Family) -> Any:
    """The family's transformers config."""
    values = {
        key: value
        for key, value in {**SIZES, **family.config}.items()
        if value is not None or key not in SIZES
    }
    return AutoConfig.for_model(name, **values)


def build_family(name: str, family: Family, implementation: str) -> torch.nn.Module:
    if name not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    config = tiny_config(name, family)
    # Only this one computes experts in float64 too.
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        part._experts_implementation = "eager"
        for key, value in part.to_dict().items():
            if "pdrop" in key or ("dropout" in key and isinstance(value, float)):
                setattr(part, key, 0.0)
    torch.manual_seed(0)
    model = getattr(transformers, family.auto).from_config(
        config, attn_implementation=implementation
    )
    for parameter in model.parameters():
        # Weights of an untrained model make attention nearly uniform: a wrong mask must show.
        if parameter.dim() > 1:
            parameter.data.mul_(3.0)
    model.family = name
    return model.double().train()

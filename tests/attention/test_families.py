"""S²-Attn in every decoder family of the installed transformers, at tiny random sizes.

The reference is the *stock* model in training mode whose full-attention layers are handed an
explicit mask per head, [batch, heads, tokens, tokens], written by `tests/reference.py`. Which
layers those are is spelled out by hand in `FAMILIES`, not asked of the package.

Models compute in float32 here and there (norms, softmax, RoPE) whatever their dtype; `in_float64`
turns that off on both sides, so that the comparison is a float64 one.

`python tests/attention/test_families.py --write` writes the table in `docs/reference/families.md`.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.overrides import TorchFunctionMode
from transformers import CONFIG_MAPPING, AutoConfig

sys.path.insert(0, str(Path(__file__).parents[1]))
from reference import head_masks

from longlora_plugin.attention import enable_shifted_attention
from longlora_plugin.plan import forward_flops, shape_of

GROUP, TOKENS = 8, 21
DOCUMENTS = [12, 9]
TOLERANCE = 1e-9
"""Largest relative error in float64, of logits and of every parameter's gradient."""
TABLE = Path(__file__).parents[2] / "docs" / "reference" / "families.md"

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

FAMILIES: dict[str, Family] = {
    "afmoe": mixed("AfmoeAttention", {**EXPERTS, "num_dense_layers": 1}, packing=NO_POSITIONS),
    "apertus": Family(),
    "arcee": Family(),
    "aria_text": Family({"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1}),
    "axk1": LATENT_DEEPSEEK,
    "bamba": hybrid({**MAMBA, "attn_layer_indices": [1]}),
    "biogpt": Family(kv_heads=4),
    "bitnet": Family(),
    "cohere": Family(),
    "cohere2": mixed("Cohere2Attention"),
    "cohere2_moe": mixed("Cohere2MoeAttention", EXPERTS),
    "cohere_compass_text": mixed(
        "CohereCompassAttention", {"rope_parameters": {SLIDING: PLAIN_ROPE, FULL: PLAIN_ROPE}}
    ),
    "ctrl": Family({"n_embd": 32, "dff": 48, "n_layer": 2, "n_head": 4}, kv_heads=4),
    "cwm": mixed("CwmAttention"),
    "dbrx": Family(
        {
            "d_model": 32,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 256,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
            "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
        }
    ),
    "deepseek_v2": Family({**LATENT, **DEEPSEEK_EXPERTS, "topk_method": "greedy"}, kv_heads=4),
    "deepseek_v3": LATENT_DEEPSEEK,
    "diffllama": Family(calls=4),
    "dots1": Family(DEEPSEEK_EXPERTS),
    "ernie4_5": Family(),
    "ernie4_5_moe": Family({"moe_intermediate_size": 16, "moe_num_experts": 4, "moe_k": 2}),
    "exaone4": mixed("Exaone4Attention"),
    "exaone_moe": mixed("ExaoneMoeAttention", EXPERTS),
    "falcon_h1": Family({**MAMBA, "mamba_d_ssm": 64}, packing=RECURRENT),
    "flex_olmo": Family({"num_experts": 4, "num_experts_per_tok": 2}),
    "fuyu": Family(kv_heads=4),
    "gemma": Family(),
    "gemma2": mixed("Gemma2Attention", {"query_pre_attn_scalar": 8}),
    "gemma3_text": mixed("Gemma3Attention", {"query_pre_attn_scalar": 8}),
    "gemma3n_text": Family(
        {
            "sliding_window": 6,
            "layer_types": [SLIDING, FULL, SLIDING, FULL],
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "laurel_rank": 4,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 97,
            "altup_num_inputs": 2,
            "activation_sparsity_pattern": [0.0] * 4,
            "intermediate_size": [48] * 4,
        },
        full=(1, 3),
        skipped={"Gemma3nTextAttention has a sliding window of 6 tokens": 2},
    ),
    "gemma4_text": mixed(
        "Gemma4TextAttention",
        {
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 97,
            "global_head_dim": 8,
            "num_global_key_value_heads": 2,
        },
    ),
    "glm": Family(),
    "glm4": Family(),
    "glm4_moe": Family(DEEPSEEK_EXPERTS),
    "glm4_moe_lite": LATENT_DEEPSEEK,
    "gpt2": Family(kv_heads=4),
    "gpt_bigcode": Family(kv_heads=1),
    "gpt_neox": Family(kv_heads=4),
    "gpt_oss": mixed(
        "GptOssAttention",
        {"num_local_experts": 4, "num_experts_per_tok": 2},
        implementations=("eager",),
        packing=NO_POSITIONS,
    ),
    "granite": Family(),
    "granite_swa": mixed("GraniteSWAAttention", implementations=("eager",)),
    "granitemoe": Family({"num_local_experts": 4}),
    "granitemoe_swa": mixed(
        "GraniteMoeSWAAttention", {"num_local_experts": 4}, implementations=("eager",)
    ),
    "granitemoehybrid": hybrid(
        {
            **MAMBA,
            "layer_types": ["mamba", "attention"],
            "shared_intermediate_size": 16,
            "num_local_experts": 4,
        }
    ),
    "granitemoeshared": Family({"num_local_experts": 4, "shared_intermediate_size": 16}),
    "helium": Family(),
    "hrm_text": Family({"H_cycles": 2, "L_cycles": 2}, kv_heads=4, modules=4, calls=12),
    "hunyuan_v1_dense": Family(),
    "hunyuan_v1_moe": Family({"num_experts": 4, "moe_topk": 2}),
    "hy_v3": Family({**EXPERTS, "first_k_dense_replace": 1}),
    "hyperclovax": Family(),
    "jais2": Family(),
    "jamba": hybrid(
        {
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "num_experts": 2,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        }
    ),
    "jetmoe": Family({"num_local_experts": 4}, kv_heads=4),
    "laguna": mixed("LagunaAttention", EXPERTS),
    "lfm2": hybrid({"layer_types": ["conv", FULL]}, skipped=CONVOLUTION),
    "lfm2_moe": hybrid(
        {**EXPERTS, "layer_types": ["conv", FULL], "num_dense_layers": 1}, skipped=CONVOLUTION
    ),
    "llama": Family(),
    "llama4_text": Family(
        {
            "num_hidden_layers": 4,
            "layer_types": ["chunked_attention"] * 3 + [FULL],
            "attention_chunk_size": 8,
            "intermediate_size_mlp": 48,
            "num_local_experts": 2,
            "moe_layers": [1],
        },
        full=(3,),
        skipped={"Llama4TextAttention is chunked attention": 3},
        packing="its chunks count from the start of the row",
    ),
    "longcat_flash": Family(
        {
            **LATENT,
            "head_dim": 4,
            "ffn_hidden_size": 48,
            "expert_ffn_hidden_size": 16,
            "n_routed_experts": 4,
            "zero_expert_num": 2,
            "moe_topk": 2,
            "num_layers": 1,
        },
        kv_heads=4,
    ),
    "mellum": mixed("MellumAttention", EXPERTS),
    "mimo_v2_flash": mixed(
        "MiMoV2FlashAttention",
        {**EXPERTS, "n_routed_experts": 4, "n_group": 1, "topk_group": 1},
        implementations=("eager",),
    ),
    "minicpm3": Family(LATENT, kv_heads=4),
    "minimax": hybrid({"layer_types": [LINEAR, FULL], "block_size": 8, "num_local_experts": 4}),
    "minimax_m2": Family({"num_local_experts": 4, "num_experts_per_tok": 2}),
    "minimax_m3_vl_text": Family(
        {
            "layer_types": ["minimax_m3_sparse", FULL],
            "index_n_heads": 2,
            "index_head_dim": 8,
            "index_block_size": 4,
            "index_topk_blocks": 2,
            "dense_intermediate_size": 48,
            "shared_intermediate_size": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rotary_dim": 4,
        },
        full=(1,),
        skipped={"MiniMaxM3VLAttention is minimax m3 sparse": 1},
        packing="its sparse layers choose blocks of the row, not of the document",
        shares_mask=True,
    ),
    "ministral": mixed("MinistralAttention"),
    "ministral3": Family(),
    "mistral": Family({"sliding_window": None}),
    "mixtral": Family({"num_local_experts": 4}),
    "modernbert-decoder": mixed("ModernBertDecoderAttention", kv_heads=4),
    "nanochat": Family(),
    "nemotron": Family(),
    "nemotron_h": Family(
        {
            "head_dim": None,
            "num_hidden_layers": None,
            "layers_block_type": ["mamba", "attention", "moe", "attention"],
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "ssm_state_size": 8,
            "n_groups": 1,
            "chunk_size": 8,
            "moe_intermediate_size": 16,
            "moe_shared_expert_intermediate_size": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
        },
        full=(1, 3),
        skipped={NO_ATTENTION: 1, "moe layer has no attention that could be shifted": 1},
        packing=RECURRENT,
    ),
    "olmo": Family(),
    "olmo2": Family(),
    "olmo3": mixed("Olmo3Attention"),
    "olmo_hybrid": hybrid({**DELTA_NET}),
    "olmoe": Family({"num_experts": 4, "num_experts_per_tok": 2}),
    "opt": Family({"ffn_dim": 48, "word_embed_proj_dim": 32}, kv_heads=4),
    "persimmon": Family(kv_heads=4),
    "phi": Family(),
    "phi3": Family(),
    "phimoe": Family({"num_local_experts": 4, "router_jitter_noise": 0.0}),
    "qwen2": Family(),
    "qwen2_moe": Family({**EXPERTS, "shared_expert_intermediate_size": 16}),
    "qwen3": Family(),
    "qwen3_5_moe_text": hybrid({**DELTA_NET, **EXPERTS, "shared_expert_intermediate_size": 16}),
    "qwen3_5_text": hybrid(DELTA_NET),
    "qwen3_moe": Family(EXPERTS),
    "qwen3_next": hybrid({**DELTA_NET, **EXPERTS, "shared_expert_intermediate_size": 16}),
    "seed_oss": Family(),
    "smollm3": Family({"no_rope_layers": [1, 0]}),
    "solar_open": Family(DEEPSEEK_EXPERTS),
    "stablelm": Family(),
    "starcoder2": Family({"sliding_window": None}),
    "vaultgemma": mixed("VaultGemmaAttention", {"query_pre_attn_scalar": 8}),
    "youtu": Family(LATENT, kv_heads=4),
    "zamba2": Family(
        {
            "num_hidden_layers": 3,
            "layers_block_type": ["mamba", "mamba", "hybrid"],
            "mamba_d_state": 8,
            "n_mamba_heads": 8,
            "mamba_headdim": 8,
            "mamba_ngroups": 1,
            "num_mem_blocks": 1,
            "adapter_rank": 4,
            "chunk_size": 8,
            "attention_head_dim": 16,
            "use_mem_rope": True,
        },
        full=(-1,),
        skipped={NO_ATTENTION: 2},
        packing=RECURRENT,
    ),
    "zaya": Family(
        {"num_experts": 4, "moe_intermediate_size": 16, "router_hidden_size": 16},
        packing=RECURRENT,
    ),
}

TEXT_OF_LLAMA = replace(FAMILIES["llama"], config={"model_type": "llama"})
FAMILIES |= {
    "gemma3": replace(
        with_vision(FAMILIES["gemma3_text"], "SiglipAttention", mm_tokens_per_image=4),
        zeros=("token_type_ids",),
    ),
    "gemma4": replace(
        with_vision(
            FAMILIES["gemma4_text"],
            "Gemma4VisionAttention",
            audio_config=None,
            vision_config={**VISION, "num_hidden_layers": 1},
        ),
        zeros=("mm_token_type_ids",),
    ),
    "glm4v": with_vision(
        Family(MULTIMODAL_ROPE), "Glm4vVisionAttention", vision_config=QWEN_VISION
    ),
    "internvl": with_vision(
        Family({"model_type": "qwen2"}),
        "InternVLVisionAttention",
        vision_config={**VISION, "image_size": [8, 8], "patch_size": [4, 4]},
    ),
    "llama4": with_vision(
        FAMILIES["llama4_text"],
        "",
        vision_config={
            **VISION,
            "vision_output_dim": 16,
            "projector_input_dim": 16,
            "projector_output_dim": 16,
            "pixel_shuffle_ratio": 0.5,
        },
    ),
    "llava": with_vision(
        TEXT_OF_LLAMA,
        "CLIPAttention",
        vision_config={**VISION, "model_type": "clip_vision_model"},
    ),
    "mistral3": with_vision(
        Family({"model_type": "mistral", "sliding_window": None}),
        "PixtralAttention",
        vision_config={**VISION, "model_type": "pixtral"},
    ),
    "mllama": with_vision(
        Family(
            {
                "num_hidden_layers": 3,
                "cross_attention_layers": [1],
                "rope_parameters": PLAIN_ROPE,
            },
            full=(0, 2),
            skipped={"MllamaTextCrossAttention is not causal": 1},
        ),
        "",
        vision_config={
            **VISION,
            "num_global_layers": 1,
            "attention_heads": 2,
            "max_num_tiles": 1,
            "vision_output_dim": 32,
            "intermediate_layers_indices": [0],
            "supported_aspect_ratios": [[1, 1]],
        },
    ),
    "qwen2_5_vl": with_vision(
        Family(MULTIMODAL_ROPE), "Qwen2_5_VLVisionAttention", vision_config=QWEN_VISION
    ),
    "qwen2_vl": with_vision(
        Family(MULTIMODAL_ROPE),
        "VisionAttention",
        vision_config={**QWEN_VISION, "hidden_size": 32},
    ),
    "qwen3_vl": with_vision(
        Family(MULTIMODAL_ROPE), "Qwen3VLVisionAttention", vision_config=QWEN_VISION
    ),
    "smolvlm": with_vision(TEXT_OF_LLAMA, "SmolVLMVisionAttention", scale_factor=2),
}

NOT_CAUSAL, SPARSE = "is not causal", "is deepseek sparse attention"
NO_INTERFACE = "does not go through transformers' attention interface"
NONE_THERE = "no attention of it goes through the interface of transformers"

UNSUPPORTED: dict[str, tuple[Family, str]] = {
    "axk2": (LATENT_DEEPSEEK, SPARSE),
    "bloom": (Family(), NONE_THERE),
    "codegen": (Family({"rotary_dim": 4}), NONE_THERE),
    "cpmant": (Family(), NONE_THERE),
    "deepseek_v32": (LATENT_DEEPSEEK, SPARSE),
    "deepseek_v4": (
        Family(
            {
                **EXPERTS,
                "q_lora_rank": 12,
                "o_lora_rank": 8,
                "n_routed_experts": 4,
                "index_n_heads": 2,
                "index_head_dim": 8,
                "qk_rope_head_dim": 4,
            }
        ),
        "is heavily compressed attention",
    ),
    "doge": (Family(), NOT_CAUSAL),
    "falcon": (Family({"head_dim": None}), NO_INTERFACE),
    "falcon_mamba": (Family({"state_size": 8}), NO_ATTENTION),
    "glm_moe_dsa": (LATENT_DEEPSEEK, SPARSE),
    "gpt_neo": (
        Family(
            {
                "num_hidden_layers": None,
                "num_layers": 2,
                "attention_types": [[["global", "local"], 1]],
                "num_heads": 4,
            }
        ),
        NO_INTERFACE,
    ),
    "gpt_neox_japanese": (Family(), NONE_THERE),
    "gptj": (Family({"rotary_dim": 4}), NO_INTERFACE),
    "inkling_text": (Family({**EXPERTS, "layer_types": ["hybrid"] * 2}), "adds a position bias"),
    "mamba": (Family({"state_size": 8}), NO_ATTENTION),
    "mistral": (Family({"sliding_window": 6}), "has a sliding window of 6 tokens"),
    "mpt": (Family({"d_model": 32, "n_heads": 4, "n_layers": 2}), NONE_THERE),
    "openai-gpt": (Family(), NONE_THERE),
    "paligemma": (
        with_vision(
            Family({"model_type": "gemma"}),
            "",
            vision_config={**VISION, "projection_dim": 32, "model_type": "siglip_vision_model"},
        ),
        f"GemmaAttention {NOT_CAUSAL}",
    ),
    "recurrent_gemma": (Family(), NONE_THERE),
    "rwkv": (Family({"attention_hidden_size": 32}), NONE_THERE),
    "xglm": (Family({"ffn_dim": 48, "attention_heads": 4, "num_layers": 2}), NONE_THERE),
}

CASES = [
    pytest.param(name, implementation, id=f"{name}-{implementation}")
    for name, family in FAMILIES.items()
    for implementation in family.implementations
]
each_family_and_implementation = pytest.mark.parametrize(("name", "implementation"), CASES)
each_family = pytest.mark.parametrize(
    ("name", "implementation"),
    [  # the implementations take turns
        pytest.param(name, family.implementations[i % len(family.implementations)], id=name)
        for i, (name, family) in enumerate(FAMILIES.items())
    ],
)


# --- models and runs ------------------------------------------------------------------------


class InFloat64(TorchFunctionMode):
    """Where code asks for float32, give it float64."""

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        args = tuple(torch.float64 if x is torch.float32 else x for x in args)
        kwargs = {k: torch.float64 if x is torch.float32 else x for k, x in (kwargs or {}).items()}
        return func(*args, **kwargs)


def build(name: str, implementation: str) -> torch.nn.Module:
    """The family's tiny model, always with the same random weights, in float64 and training."""
    return build_family(name, FAMILIES[name], implementation)


def build_family(name: str, family: Family, implementation: str) -> torch.nn.Module:
    if name not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    values = {
        key: value
        for key, value in {**SIZES, **family.config}.items()
        if value is not None or key not in SIZES
    }
    config = AutoConfig.for_model(name, **values)
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


def tokens(rows: int = 1, length: int = TOKENS, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(10, 97, (rows, length), generator=generator)


def logits(model: torch.nn.Module, ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
    """[rows, tokens, vocabulary]; routers that draw at random draw the same each time."""
    torch.manual_seed(0)
    zeros = {name: torch.zeros_like(ids) for name in FAMILIES[model.family].zeros}
    return model(ids, **{"use_cache": False, **zeros, **inputs}).logits


def logits_in_float64(model: torch.nn.Module, ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
    with InFloat64():
        return logits(model, ids, **inputs)


def gradients(model: torch.nn.Module, out: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of a fixed random weighing of the logits, for every parameter that takes part."""
    model.zero_grad()
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=out.dtype)
    with InFloat64():
        (out * weights).sum().backward()
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def error(actual: torch.Tensor, expected: torch.Tensor, floor: float = 0.0) -> float:
    """Largest difference, relative to the largest number expected or to `floor`, if greater."""
    largest = max(expected.abs().max().item(), floor)
    return (actual - expected).abs().max().item() / (largest or 1.0)


@contextmanager
def masked_per_head(
    model: torch.nn.Module,
    name: str,
    implementation: str,
    documents: list[int] | None = None,
    only: tuple[int, ...] | None = None,
) -> Iterator[None]:
    """The stock model, its full-attention layers handed the oracle's mask per head."""
    family = FAMILIES[name]
    mask = head_masks(documents or [TOKENS], GROUP, family.heads, family.kv_heads)[None]
    if implementation == "eager":
        forbidden = torch.finfo(torch.float64).min
        mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, forbidden)

    def hand_over(module: torch.nn.Module, args: Any, kwargs: Any) -> Any:
        given = inspect.signature(module.forward).bind(*args, **kwargs)
        stock = given.arguments.get("attention_mask")
        given.arguments["attention_mask"] = (
            {**stock, "causal": mask} if isinstance(stock, dict) else mask  # Zaya's is a dict
        )
        return given.args, given.kwargs

    layers = [
        module
        for module in model.modules()
        if getattr(module, "layer_idx", None) in (only or family.full)
        and type(module).__name__.endswith(("Attention", "MLA"))
        and "attention_mask" in inspect.signature(module.forward).parameters
    ]
    assert len(layers) == (len(only) if only else family.layers), [type(layer) for layer in layers]
    hooks = [layer.register_forward_pre_hook(hand_over, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@dataclass(frozen=True)
class Comparison:
    """Shifted training against the stock model under a mask per head."""

    error: float
    from_full_attention: float
    layers: int
    calls: int
    skipped: dict[str, int]


@cache
def compare(name: str, implementation: str) -> Comparison:
    model, ids = build(name, implementation), tokens(2)
    full = logits_in_float64(model, ids).detach()
    with masked_per_head(model, name, implementation):
        expected = logits_in_float64(model, ids)
        expected_gradients = gradients(model, expected)
    handle = enable_shifted_attention(model, group_size=GROUP)
    actual = logits_in_float64(model, ids)
    calls = handle.calls
    actual_gradients = gradients(model, actual)
    assert actual_gradients.keys() == expected_gradients.keys()
    # Some gradients are zero but for rounding: the bias of keys changes no softmax.
    floor = 1e-5 * max(gradient.abs().max().item() for gradient in expected_gradients.values())
    errors = [error(actual, expected)] + [
        error(actual_gradients[key], expected_gradients[key], floor) for key in expected_gradients
    ]
    return Comparison(max(errors), error(actual, full), handle.layers, calls, handle.skipped)


# --- what must hold in every family ---------------------------------------------------------


@each_family_and_implementation
def test_training_equals_the_stock_model_under_a_mask_per_head(
    name: str, implementation: str
) -> None:
    assert compare(name, implementation).error < TOLERANCE


@each_family_and_implementation
def test_every_full_attention_layer_is_shifted_and_the_others_are_named(
    name: str, implementation: str
) -> None:
    family, seen = FAMILIES[name], compare(name, implementation)
    assert (seen.layers, seen.skipped) == (family.layers, family.skipped)
    assert seen.calls == (family.calls or family.layers)
    assert seen.from_full_attention > 1e-4


@pytest.mark.parametrize("name", FAMILIES)
def test_plan_counts_a_fully_attending_layer_for_each_call_of_shifted_attention(name: str) -> None:
    family = FAMILIES[name]
    shape = shape_of(build_family(name, family, family.implementations[0]))
    calls = family.layers if name == "diffllama" else family.calls  # two calls of half the width
    assert shape.full_layers - shape.unshifted == (calls or family.layers)


@each_family_and_implementation
def test_evaluation_while_enabled_and_training_after_remove_are_bit_for_bit_stock(
    name: str, implementation: str
) -> None:
    model, ids = build(name, implementation), tokens(2)
    stock_training = logits(model, ids)
    stock_evaluation = logits(model.eval(), ids)
    handle = enable_shifted_attention(model, group_size=GROUP)
    assert torch.equal(logits(model, ids), stock_evaluation)
    assert handle.calls == 0
    model.train()
    assert not torch.equal(logits(model, ids), stock_training)
    handle.remove()
    assert torch.equal(logits(model, ids), stock_training)
    assert torch.equal(logits(model.eval(), ids), stock_evaluation)


@each_family
def test_no_token_sees_a_later_one_in_training(name: str, implementation: str) -> None:
    model, ids = build(name, implementation), tokens(1)
    enable_shifted_attention(model, group_size=GROUP)
    changed = ids.clone()
    changed[0, -1] = (changed[0, -1] - 10 + 1) % 87 + 10
    before, after = (logits_in_float64(model, x)[0].detach() for x in (ids, changed))
    assert error(after[:-1], before[:-1]) < TOLERANCE
    assert error(after[-1], before[-1]) > 1e-3


@each_family
def test_rows_padded_on_either_side_equal_the_rows_alone(name: str, implementation: str) -> None:
    model = build(name, implementation)
    enable_shifted_attention(model, group_size=GROUP)
    ids, padding = tokens(3), torch.ones(3, TOKENS, dtype=torch.long)
    short = 13
    sides = {"right": (1, slice(0, short)), "left": (2, slice(TOKENS - short, TOKENS))}
    for row, real in sides.values():
        padding[row] = 0
        padding[row, real] = 1
    padded = logits_in_float64(
        model,
        ids * padding,
        attention_mask=padding,
        position_ids=(padding.cumsum(1) - 1).clamp(min=0),
    )
    assert error(padded[0], logits_in_float64(model, ids[:1])[0]) < TOLERANCE
    if FAMILIES[name].shares_mask:
        del sides["left"]  # MiniMax M3's sparse layers choose blocks that count from the padding
    for side, (row, real) in sides.items():
        alone = logits_in_float64(model, ids[row : row + 1, real])[0]
        assert error(padded[row, real], alone) < TOLERANCE, side


@pytest.mark.parametrize("mask", ["no-mask", "mask-of-ones"])
@each_family
def test_packed_documents_equal_the_documents_alone(
    name: str, implementation: str, mask: str
) -> None:
    family, model, ids = FAMILIES[name], build(name, implementation), tokens()
    packed: dict[str, Any] = {
        "position_ids": torch.cat([torch.arange(length) for length in DOCUMENTS])[None]
    }
    inputs = dict(packed)
    if mask == "mask-of-ones":
        # Stock transformers looks for packed documents only where there is no mask.
        inputs["attention_mask"] = torch.ones(1, TOKENS, dtype=torch.long)
    with masked_per_head(model, name, implementation, DOCUMENTS):
        expected = logits_in_float64(model, ids, **(packed if family.shares_mask else inputs))
    enable_shifted_attention(model, group_size=GROUP)
    actual = logits_in_float64(model, ids, **inputs)
    assert error(actual, expected) < TOLERANCE
    if family.packing or (family.skipped and mask == "mask-of-ones"):
        return  # stock layers that S² does not cover mix documents here
    alone = [logits_in_float64(model, part)[0] for part in ids.split(DOCUMENTS, dim=1)]
    assert error(actual[0], torch.cat(alone)) < TOLERANCE


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.packing])
def test_stock_model_mixes_packed_documents_where_the_table_says_so(name: str) -> None:
    model, ids = build(name, FAMILIES[name].implementations[0]), tokens()
    position_ids = torch.cat([torch.arange(length) for length in DOCUMENTS])[None]
    packed = logits_in_float64(model, ids, position_ids=position_ids)
    alone = [logits_in_float64(model, part)[0] for part in ids.split(DOCUMENTS, dim=1)]
    assert error(packed[0], torch.cat(alone)) > 1e-3


# --- what is not covered --------------------------------------------------------------------


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_family_is_refused_with_the_reason(name: str) -> None:
    assert refusal(name).count(UNSUPPORTED[name][1]) == 1


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_plan_lets_shifted_attention_save_nothing_in_an_unsupported_family(name: str) -> None:
    model = build_family(name, UNSUPPORTED[name][0], "eager")
    shape = shape_of(model)
    assert shape.full_layers == shape.unshifted
    assert forward_flops(shape, 64, 8) == forward_flops(shape, 64)


@cache
def refusal(name: str) -> str:
    """Why S² covers no layer of an unsupported family."""
    model = build_family(name, UNSUPPORTED[name][0], "eager")
    with pytest.raises(ValueError, match="shifted attention covers no layer of ") as raised:
        enable_shifted_attention(model, group_size=GROUP)
    return str(raised.value).split(": ", 1)[1]


def test_window_as_long_as_the_context_counts_as_full_attention() -> None:
    family = replace(FAMILIES["mistral"], config={"sliding_window": 256})
    model = build_family("mistral", family, "sdpa")
    assert enable_shifted_attention(model, group_size=GROUP).layers == 2
    padding = torch.ones(2, TOKENS, dtype=torch.long)
    padding[1, 13:] = 0
    ids = tokens(2)
    padded = logits_in_float64(model, ids, attention_mask=padding)
    assert error(padded[1, :13], logits_in_float64(model, ids[1:, :13])[0]) < TOLERANCE


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["gemma3_text", "llama4_text", "minimax_m3_vl_text"])
def test_stock_layers_keep_their_mask_in_rows_shorter_than_their_window(
    name: str, implementation: str, padded: bool
) -> None:
    wide = {"sliding_window": 64, "attention_chunk_size": 64, "index_block_size": 64}
    family = FAMILIES[name]
    config = {key: wide.get(key, value) for key, value in family.config.items()}
    model, ids = build_family(name, replace(family, config=config), implementation), tokens()
    padding = torch.ones(1, TOKENS, dtype=torch.long)
    if padded:
        padding[0, 13:] = 0
    documents = [13, TOKENS - 13] if padded else [TOKENS]
    with masked_per_head(model, name, implementation, documents):
        expected = logits_in_float64(model, ids, attention_mask=padding)
    enable_shifted_attention(model, group_size=GROUP)
    actual = logits_in_float64(model, ids, attention_mask=padding)
    real = slice(0, 13 if padded else TOKENS)
    assert error(actual[:, real], expected[:, real]) < TOLERANCE


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_layer_left_in_evaluation_keeps_its_stock_mask(implementation: str, padded: bool) -> None:
    model, ids = build("llama", implementation), tokens()
    padding = torch.ones(1, TOKENS, dtype=torch.long)
    if padded:
        padding[0, 13:] = 0
    model.model.layers[0].eval()
    documents = [13, TOKENS - 13] if padded else [TOKENS]
    with masked_per_head(model, "llama", implementation, documents, only=(1,)):
        expected = logits_in_float64(model, ids, attention_mask=padding)
    handle = enable_shifted_attention(model, group_size=GROUP)
    actual = logits_in_float64(model, ids, attention_mask=padding)
    assert handle.calls == 1
    assert error(actual[:, : documents[0]], expected[:, : documents[0]]) < TOLERANCE


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_images_go_through_the_stock_vision_tower(implementation: str) -> None:
    model, ids = build("llava", implementation), tokens()
    ids[0, 2:6] = IMAGE_TOKENS["image_token_id"]
    pixels = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(3)).double()
    with masked_per_head(model, "llava", implementation):
        expected = logits_in_float64(model, ids, pixel_values=pixels)
    handle = enable_shifted_attention(model, group_size=GROUP)
    actual = logits_in_float64(model, ids, pixel_values=pixels)
    assert error(actual, expected) < TOLERANCE
    assert handle.calls == 2
    assert error(logits_in_float64(model, ids, pixel_values=2 * pixels), actual) > 1e-3


def test_image_tokens_that_see_each_other_are_refused_not_made_causal() -> None:
    model, ids = build("gemma3", "sdpa"), tokens()
    ids[0, 2:6] = IMAGE_TOKENS["image_token_id"]
    images = (ids == IMAGE_TOKENS["image_token_id"]).long()
    pixels = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(3)).double()
    enable_shifted_attention(model, group_size=GROUP)
    with pytest.raises(ValueError, match="needs plain causal attention"):
        logits(model, ids, pixel_values=pixels, token_type_ids=images)


# --- the table in the docs ------------------------------------------------------------------

INTRODUCTION = """# Model families

S²-Attn needs no code for a model family: it goes through transformers' two registries of attention
and mask functions. This page lists what was checked, with transformers {version}, by
`tests/attention/test_families.py`; it is written by
`python tests/attention/test_families.py --write`.

Each row is a tiny random model in float64 (where the family's code asks for float32, it is given
float64 as well). Its training output and the gradient of every parameter equal those of the stock
model under an explicit mask per head, up to the error shown, which is relative to the largest
number expected; the test allows {tolerance:.0e}. Moreover, for every row: evaluation is bit for
bit stock while S²-Attn is enabled, and training is after `remove()`; no token sees a later one;
rows padded on the left or on the right equal the rows alone; packed documents equal the documents
alone, or, where the last column says that the stock model's other layers mix them, the stock model
under the documents' mask.

Layers with a sliding window shorter than `max_position_embeddings`, with chunks, and those without
attention keep the stock path; `handle.skipped` counts them. Families that are not on this page may
work: after a training step, `handle.calls` tells whether S²-Attn ran.

## Supported: {supported}

| family | covered layers | not covered | attention | precision | max error | packed documents |
|---|---|---|---|---|---|---|
"""
REFUSED = """
Vision and audio towers and cross-attention are never covered. `sdpa` ignores Gemma 2's softcap, in
stock transformers as here; `eager` applies it. Image tokens that see each other (Gemma 3 with
images) need a mask that is not causal: training then stops with an error that says so.

## Refused: {refused}

`enable_shifted_attention` raises a ValueError with this reason.

| family | reason |
|---|---|
"""
ERROR_COLUMN = 6


def supported_row(name: str) -> str:
    family = FAMILIES[name]
    seen = {
        implementation: compare(name, implementation) for implementation in family.implementations
    }
    first = next(iter(seen.values()))
    cells = [
        f"`{name}`",
        f"{first.layers} of {first.layers + sum(first.skipped.values())}",
        "; ".join(f"{count} × {reason}" for reason, count in first.skipped.items()) or "—",
        ", ".join(seen),
        "float64",
        f"{max(comparison.error for comparison in seen.values()):.0e}",
        f"stock layers mix them: {family.packing}" if family.packing else "kept apart",
    ]
    return f"| {' | '.join(cells)} |"


def table() -> str:
    """The page `docs/reference/families.md`."""
    page = INTRODUCTION.format(
        version=transformers.__version__, tolerance=TOLERANCE, supported=len(FAMILIES)
    )
    page += "".join(f"{supported_row(name)}\n" for name in sorted(FAMILIES))
    page += REFUSED.format(refused=len(UNSUPPORTED))
    page += "".join(f"| `{name}` | {refusal(name)} |\n" for name in sorted(UNSUPPORTED))
    return page


def without_errors(page: str) -> tuple[list[str], list[float]]:
    """The page's lines without the column of errors, which rounding changes, and that column."""
    lines, errors = [], []
    for line in page.splitlines():
        cells = line.split("|")
        if len(cells) == 9 and "e-" in cells[ERROR_COLUMN]:
            errors.append(float(cells.pop(ERROR_COLUMN)))
        lines.append("|".join(cells))
    return lines, errors


def test_committed_table_is_up_to_date() -> None:
    written = TABLE.read_text()
    if f"transformers {transformers.__version__}," not in written:
        pytest.skip(f"the table is of another transformers than {transformers.__version__}")
    lines, errors = without_errors(written)
    assert lines == without_errors(table())[0]
    assert len(errors) == len(FAMILIES)
    assert max(errors) < TOLERANCE


def test_table_holds_at_least_the_promised_families() -> None:
    promised = (
        "llama mistral mixtral qwen2 qwen2_moe qwen3 qwen3_moe gemma gemma2 gemma3 phi phi3 "
        "gpt_neox falcon stablelm starcoder2 cohere cohere2 olmo2 granite glm4 smollm3 nemotron "
        "helium ernie4_5 exaone4 deepseek_v3 gpt_oss seed_oss"
    )
    assert set(promised.split()) <= set(FAMILIES) | set(UNSUPPORTED)
    assert len(FAMILIES) >= 30


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        raise SystemExit("usage: python tests/attention/test_families.py --write")
    TABLE.parent.mkdir(parents=True, exist_ok=True)
    TABLE.write_text(table())

"""Every decoder family of the installed transformers, at tiny random sizes: a table, and a maker.

Which layers have full attention is spelled out by hand, not asked of the package.
"""

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

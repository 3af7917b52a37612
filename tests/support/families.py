"""Every decoder family of the installed transformers, at tiny random sizes: the table.

Which layers have full attention is spelled out by hand, not asked of the package.
"""

from __future__ import annotations

from dataclasses import replace

from family_models import (
    CONVOLUTION,
    DEEPSEEK_EXPERTS,
    DELTA_NET,
    EXPERTS,
    FULL,
    LATENT,
    LATENT_DEEPSEEK,
    LINEAR,
    MAMBA,
    MULTIMODAL_ROPE,
    NO_ATTENTION,
    NO_POSITIONS,
    PLAIN_ROPE,
    QWEN_VISION,
    RECURRENT,
    SLIDING,
    VISION,
    Family,
    hybrid,
    mixed,
    with_vision,
)

PLAIN = """
    apertus arcee bitnet cohere ernie4_5 gemma glm glm4 granite helium hunyuan_v1_dense
    hyperclovax jais2 llama ministral3 nanochat nemotron olmo olmo2 phi phi3 qwen2 qwen3
    seed_oss stablelm
"""
"""Families that need nothing besides the common sizes."""

FAMILIES: dict[str, Family] = {name: Family() for name in PLAIN.split()} | {
    "afmoe": mixed("AfmoeAttention", {**EXPERTS, "num_dense_layers": 1}, packing=NO_POSITIONS),
    "aria_text": Family({"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1}),
    "axk1": LATENT_DEEPSEEK,
    "bamba": hybrid({**MAMBA, "attn_layer_indices": [1]}),
    "biogpt": Family(kv_heads=4),
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
    "ernie4_5_moe": Family({"moe_intermediate_size": 16, "moe_num_experts": 4, "moe_k": 2}),
    "exaone4": mixed("Exaone4Attention"),
    "exaone_moe": mixed("ExaoneMoeAttention", EXPERTS),
    "falcon_h1": Family({**MAMBA, "mamba_d_ssm": 64}, packing=RECURRENT),
    "flex_olmo": Family({"num_experts": 4, "num_experts_per_tok": 2}),
    "fuyu": Family(kv_heads=4),
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
    "hrm_text": Family({"H_cycles": 2, "L_cycles": 2}, kv_heads=4, modules=4, calls=12),
    "hunyuan_v1_moe": Family({"num_experts": 4, "moe_topk": 2}),
    "hy_v3": Family({**EXPERTS, "first_k_dense_replace": 1}),
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
    "mistral": Family({"sliding_window": None}),
    "mixtral": Family({"num_local_experts": 4}),
    "modernbert-decoder": mixed("ModernBertDecoderAttention", kv_heads=4),
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
    "olmo3": mixed("Olmo3Attention"),
    "olmo_hybrid": hybrid({**DELTA_NET}),
    "olmoe": Family({"num_experts": 4, "num_experts_per_tok": 2}),
    "opt": Family({"ffn_dim": 48, "word_embed_proj_dim": 32}, kv_heads=4),
    "persimmon": Family(kv_heads=4),
    "phimoe": Family({"num_local_experts": 4, "router_jitter_noise": 0.0}),
    "qwen2_moe": Family({**EXPERTS, "shared_expert_intermediate_size": 16}),
    "qwen3_5_moe_text": hybrid({**DELTA_NET, **EXPERTS, "shared_expert_intermediate_size": 16}),
    "qwen3_5_text": hybrid(DELTA_NET),
    "qwen3_moe": Family(EXPERTS),
    "qwen3_next": hybrid({**DELTA_NET, **EXPERTS, "shared_expert_intermediate_size": 16}),
    "smollm3": Family({"no_rope_layers": [1, 0]}),
    "solar_open": Family(DEEPSEEK_EXPERTS),
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

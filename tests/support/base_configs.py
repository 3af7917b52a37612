"""config.json files of the models that recipes start from: their true dimensions, no weights.

Copied values are facts of the published configs; nothing here needs a network.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def _llama_2(hidden: int, intermediate: int, layers: int, heads: int, kv: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 32000,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
    }


_MISTRAL = {
    "model_type": "mistral",
    "architectures": ["MistralForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
}
_LLAMA_3 = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
_LLAMA_3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_QWEN_2_5 = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "sliding_window": 131072,
    "use_sliding_window": False,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "meta-llama/Llama-2-7b-hf": _llama_2(4096, 11008, 32, 32, 32),
    "meta-llama/Llama-2-7b-chat-hf": _llama_2(4096, 11008, 32, 32, 32),
    "meta-llama/Llama-2-13b-hf": _llama_2(5120, 13824, 40, 40, 40),
    "meta-llama/Llama-2-70b-hf": _llama_2(8192, 28672, 80, 64, 8),
    "meta-llama/Meta-Llama-3-8B": {**_LLAMA_3, "max_position_embeddings": 8192},
    "meta-llama/Llama-3.1-8B": {
        **_LLAMA_3,
        "max_position_embeddings": 131072,
        "rope_scaling": _LLAMA_3_SCALING,
    },
    "meta-llama/Llama-3.2-1B": {
        **_LLAMA_3,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "rope_scaling": {**_LLAMA_3_SCALING, "factor": 32.0},
        "tie_word_embeddings": True,
    },
    "mistralai/Mistral-7B-v0.1": {
        **_MISTRAL,
        "vocab_size": 32000,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
    },
    "mistralai/Mistral-7B-v0.3": {
        **_MISTRAL,
        "vocab_size": 32768,
        "rope_theta": 1000000.0,
        "sliding_window": None,
    },
    "Qwen/Qwen2.5-7B-Instruct": _QWEN_2_5,
    "Qwen/Qwen3-8B-Base": {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "max_window_layers": 36,
        "use_sliding_window": False,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
    },
    "HuggingFaceTB/SmolLM2-135M": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
    "google/gemma-2-2b": {
        "model_type": "gemma2",
        "architectures": ["Gemma2ForCausalLM"],
        "vocab_size": 256000,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 8192,
        "sliding_window": 4096,
    },
    "microsoft/phi-2": {
        "model_type": "phi",
        "architectures": ["PhiForCausalLM"],
        "vocab_size": 51200,
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 2048,
        "partial_rotary_factor": 0.4,
    },
    "EleutherAI/pythia-1.4b": {
        "model_type": "gpt_neox",
        "architectures": ["GPTNeoXForCausalLM"],
        "vocab_size": 50304,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "max_position_embeddings": 2048,
        "rotary_pct": 0.25,
    },
    "mistralai/Mixtral-8x7B-v0.1": {
        **_MISTRAL,
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "vocab_size": 32000,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    "NousResearch/CodeLlama-7b-hf": {
        **_llama_2(4096, 11008, 32, 32, 32),
        "vocab_size": 32016,
        "max_position_embeddings": 16384,
        "rope_theta": 1000000.0,
    },
}


# What benchmarks/experiments/smollm2/prepare.py writes; here for machines where it has not run.
CONFIGS["outputs/smollm2/model"] = {
    **CONFIGS["HuggingFaceTB/SmolLM2-135M"],
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# What `make longqa` copies: the bundled model, extended to 2048 tokens and merged.
CONFIGS["outputs/longqa/extended"] = {
    **json.loads((Path(__file__).parents[2] / "examples/quickstart/model/config.json").read_text()),
    "max_position_embeddings": 2048,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "original_max_position_embeddings": 256,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
    },
}


def write(name: str, root: Path) -> Path:
    """Write the config.json of model `name` under `root`; returns its folder."""
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIGS[name]), encoding="utf-8")
    return folder

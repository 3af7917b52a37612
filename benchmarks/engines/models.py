"""Small models with every kind of RoPE, as training here saves them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

BUNDLED = Path(__file__).parents[2] / "examples/quickstart/model"
CONTEXT, TARGET, ROW = 256, 2048, 1536
OPTIONS: dict[str, dict[str, Any]] = {
    "yarn": {},
    "linear": {},
    "ntk": {},
    "theta": {"theta": 80_000.0},
    "llama3": {},
    "dynamic": {},
    "longrope": {},
}
"""Preset → its options; `longrope` gets factor lists of the right length."""
TYPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {},
    "phi3": {"pad_token_id": 0, "tie_word_embeddings": False},
    "gemma2": {"query_pre_attn_scalar": 32},
    "gemma3_text": {"query_pre_attn_scalar": 32, "sliding_window": 512, "num_hidden_layers": 6},
    "olmo2": {"tie_word_embeddings": False},
}
"""Model type → fields of its config; `llama` is the bundled model, the others are random.

Layers of Gemma 3 take turns, five with a sliding window and θ of their own to one without."""
PRESETS_OF = {"phi3": ("ntk", "theta", "longrope")}
"""The presets of a model type that transformers does not build with every one."""


def make_models(root: Path, only: Sequence[str] = ("",)) -> Iterator[tuple[str, str, Path]]:
    """Save each model type with each preset, or those with one of `only` in their folder's name.

    Yields:
        Model type, preset, folder.
    """
    from longlora_plugin.artifacts.callback import name_for_older_readers
    from longlora_plugin.rope import apply_rope, keep_both_spellings, resolve_rope

    for model_type in TYPES:
        model, tokenizer = _model(model_type)
        for preset, options in OPTIONS.items():
            folder = root / f"{model_type}-{preset}"
            is_asked = any(part in folder.name for part in only)
            if not is_asked or preset not in PRESETS_OF.get(model_type, OPTIONS):
                continue
            if preset == "longrope":
                pairs = model.config.hidden_size // model.config.num_attention_heads // 2
                long = [1 + 7 * index / (pairs - 1) for index in range(pairs)]
                options = {"short_factor": [1.0] * pairs, "long_factor": long}
            original = type(model.config).from_dict(model.config.to_dict())
            apply_rope(original, resolve_rope(preset, original, TARGET, **options))
            keep_both_spellings(original)
            model.save_pretrained(folder)
            original.architectures = model.config.architectures
            original.dtype = "float32"
            original.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            name_for_older_readers(folder)
            yield model_type, preset, folder


def row_of_tokens() -> list[int]:
    """A row of the bundled model's own language: a book that it was not trained on is not needed,
    since engines are compared with each other."""
    from transformers import AutoTokenizer

    text = (BUNDLED / "README.md").read_text(encoding="utf-8") * 4
    ids = AutoTokenizer.from_pretrained(BUNDLED)(text)["input_ids"][:ROW]
    assert len(ids) == ROW
    return ids


def _model(model_type: str) -> tuple[Any, Any]:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
    if model_type == "llama":
        return AutoModelForCausalLM.from_pretrained(BUNDLED, dtype=torch.float32), tokenizer
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        model_type,
        **{
            "vocab_size": len(tokenizer),
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "max_position_embeddings": CONTEXT,
            "initializer_range": 0.15,
            "tie_word_embeddings": True,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            **TYPES[model_type],
        },
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32), tokenizer

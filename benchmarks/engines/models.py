"""Small models with every kind of RoPE, as training here saves them."""

from __future__ import annotations

from collections.abc import Iterator
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
TYPES = ("llama", "mistral", "qwen2", "qwen3")
"""Model types; `llama` is the bundled model, the others are random."""


def make_models(root: Path, only: str = "") -> Iterator[tuple[str, str, Path]]:
    """Save each model type with each preset, or those with `only` in their folder's name.

    Yields:
        Model type, preset, folder.
    """
    from longlora_plugin.artifacts.tokenizer import name_for_older_readers
    from longlora_plugin.rope import apply_rope, keep_both_spellings, resolve_rope

    for model_type in TYPES:
        model, tokenizer = _model(model_type)
        for preset, options in OPTIONS.items():
            folder = root / f"{model_type}-{preset}"
            if only not in folder.name:
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
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        initializer_range=0.15,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        sliding_window=None,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32), tokenizer

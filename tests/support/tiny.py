"""The one maker of tiny models, tokenizers and recipes that tests train and evaluate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

SPECIAL = {"<s>": "bos_token", "</s>": "eos_token", "<pad>": "pad_token"}


def byte_tokenizer(
    *texts: str,
    special_tokens: Sequence[str] = tuple(SPECIAL),
    size: int = 320,
    begins: bool = False,
) -> Any:
    """A byte-level BPE tokenizer of at most `size` tokens, trained on `texts`.

    Args:
        special_tokens: those of <s>, </s> and <pad>, in the order of their ids.
        begins: whether every text begins with <s>.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if begins:
        first = ("<s>", tokenizer.token_to_id("<s>"))
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[first])
    roles = {SPECIAL[token]: token for token in special_tokens}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles)


def llama(layers: int = 2, *, weights: float = 1.0, **config: Any) -> Any:
    """A random Llama in training, always the same, without a tokenizer.

    Args:
        weights: factor on its matrices. Untrained, attention is nearly uniform: a wrong mask shows
            with 3.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "attn_implementation": "sdpa",
    }
    model = LlamaForCausalLM(LlamaConfig(**{**shape, **config})).train()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(weights)
    return model


def write_llama(folder: Path, tokenizer: Any, **config: object) -> Path:
    """A random Llama of 2 layers for 64 tokens and its tokenizer, saved in `folder`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    LlamaForCausalLM(LlamaConfig(**{**shape, **config})).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_recipe(path: Path, base: Path, output: Path, keys: Mapping[str, Any]) -> Path:
    """A recipe for `adapter: longlora`; a key whose value is "" is left out."""
    recipe = {"base_model": str(base), "adapter": "longlora", "output_dir": str(output), **keys}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({key: value for key, value in recipe.items() if value != ""}))
    return path


def training(data: Path, prepared: Path) -> dict[str, Any]:
    """Keys of a short run on one CPU that gives the same in every run."""
    return {
        "datasets": [{"path": str(data), "ds_type": "json", "type": "completion"}],
        "dataset_prepared_path": str(prepared),
        "dataset_num_proc": 1,  # no processes, each of which would import Axolotl
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "logging_steps": 1,
        "optimizer": "adamw_torch",
        "lr_scheduler": "constant",
        "attn_implementation": "sdpa",
        "lora_mlp_kernel": False,
        "lora_qkv_kernel": False,
        "lora_o_kernel": False,
        "val_set_size": 0,
        "seed": 42,
    }

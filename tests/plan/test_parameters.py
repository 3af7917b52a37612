"""What is trained and what is frozen: against PEFT's counts and published sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from plan_material import CONFIGS, LLAMA_SAVED, plan_of, tiny_llama, write_recipe
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen2VLConfig,
    ViTConfig,
)

from longlora_plugin.plan.parameters import count_parameters
from longlora_plugin.plan.shape import meta_model, shape_of
from longlora_plugin.run.recipe import read_recipe


def llama(
    hidden: int, ffn: int, layers: int, heads: int, kv_heads: int, **changes: Any
) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, **changes,
    )  # fmt: skip


def counts_of_peft(config: Any, **lora: Any) -> tuple[int, int]:
    from peft import LoraConfig, get_peft_model

    model = AutoModelForCausalLM.from_config(config)
    tied = config.tie_word_embeddings and bool(lora.get("modules_to_save"))
    peft_model = get_peft_model(model, LoraConfig(**lora, ensure_weight_tying=tied))
    trained = sum(p.numel() for p in peft_model.parameters() if p.requires_grad)
    return trained, sum(p.numel() for p in peft_model.parameters()) - trained


@pytest.mark.parametrize("family", CONFIGS)
def test_adapter_longlora_trains_what_peft_trains(tmp_path: Path, family: str) -> None:
    config, targets, saved = CONFIGS[family], ["q_proj", "k_proj", "v_proj", "o_proj"], LLAMA_SAVED
    if family == "gpt-neox":
        targets = ["query_key_value", "dense"]
        saved = ["embed_in", "input_layernorm", "post_attention_layernorm", "final_layer_norm"]
    recipe = read_recipe(write_recipe(tmp_path, config, adapter="longlora", sequence_len=256))
    planned = plan_of(recipe, config).parameters
    expected = counts_of_peft(config, r=8, target_modules=targets, modules_to_save=saved)
    assert (planned["trained"], planned["frozen"]) == expected


@pytest.mark.parametrize(
    "lora",
    [
        {"r": 4, "target_modules": ["q_proj", "down_proj"]},
        {"r": 4, "target_modules": "all-linear"},
        {"r": 4, "target_modules": r".*layers\.[01]\.self_attn\.(q|v)_proj"},
        {"r": 4, "target_modules": ["q_proj"], "use_dora": True},
        {"r": 4, "target_modules": ["embed_tokens", "v_proj"]},
        {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
    ids=["names", "all-linear", "regex", "dora", "embedding", "saved"],
)
def test_lora_counts_are_those_of_peft(lora: dict[str, Any]) -> None:
    config = tiny_llama()
    counted = count_parameters(
        meta_model(config),
        lora_r=lora["r"],
        target_modules=lora["target_modules"],
        dora=lora.get("use_dora", False),
        saved_modules=lora.get("modules_to_save", ()),
    )
    assert (counted.trained, counted.frozen) == counts_of_peft(config, **lora)


def test_lora_on_fused_experts_counts_each_expert() -> None:
    config = MixtralConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    fused = "mlp.experts.down_proj"
    counted = count_parameters(meta_model(config), lora_r=4, target_parameters=[fused])
    expected = counts_of_peft(config, r=4, target_modules=[], target_parameters=[fused])
    assert (counted.trained, counted.frozen) == expected


def test_a_full_fine_tune_trains_everything_or_what_is_unfrozen(llama_7b: Any) -> None:
    everything = count_parameters(llama_7b)
    assert (everything.trained, everything.frozen) == (6_738_415_616, 0)
    head = count_parameters(llama_7b, unfrozen=["^lm_head.weight$", r"model\.norm"])
    assert head.trained == 32000 * 4096 + 4096


def test_llama2_7b_trains_what_the_paper_says(llama_7b: Any, tmp_path: Path) -> None:
    """Embeddings are below 2 % of the parameters and norms 0.004 %."""
    recipe = write_recipe(tmp_path, LlamaConfig(), adapter="longlora", sequence_len=8192)
    counts = plan_of(read_recipe(recipe), LlamaConfig()).parameters
    assert counts["lora"] == 32 * 4 * 8 * (4096 + 4096)
    assert counts["copies"] == 32000 * 4096 + 65 * 4096
    assert 32000 * 4096 / counts["frozen"] < 0.02
    assert 65 * 4096 / counts["frozen"] == pytest.approx(0.00004, rel=0.02)


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (LlamaConfig(), 6_738_415_616),
        (llama(5120, 13824, 40, 40, 40), 13_015_864_320),
        (llama(8192, 28672, 80, 64, 8), 68_976_648_192),
        (llama(4096, 14336, 32, 32, 8, vocab_size=128256), 8_030_261_248),
        (MistralConfig(), 7_241_732_096),
        (
            Qwen2Config(
                vocab_size=152064, hidden_size=3584, intermediate_size=18944,
                num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4,
            ),
            7_615_616_512,
        ),
    ],
    ids=["llama2-7b", "llama2-13b", "llama2-70b", "llama3.1-8b", "mistral-7b", "qwen2.5-7b"],
)  # fmt: skip
def test_the_base_counts_are_the_published_ones(config: Any, count: int) -> None:
    assert count_parameters(meta_model(config)).base == count


def test_a_model_with_vision_is_planned_by_its_text_decoder() -> None:
    config = Qwen2VLConfig()
    config.get_text_config().num_hidden_layers = 2
    model = meta_model(config)
    text = config.get_text_config()
    shape = shape_of(model)
    assert shape.ffn_weights == 2 * 3 * text.hidden_size * text.intermediate_size
    counts = count_parameters(model)
    assert counts.base == sum(p.numel() for p in model.parameters())
    layer = model.get_decoder().layers[0]
    assert counts.largest_unit == max(
        sum(p.numel() for p in layer.parameters()), shape.head_weights
    )


def test_a_config_without_a_language_model_is_an_error() -> None:
    with pytest.raises(ValueError, match="no language model for model_type 'vit'"):
        meta_model(ViTConfig())


def test_targets_that_match_nothing_are_an_error_naming_the_layers() -> None:
    with pytest.raises(ValueError, match=r"query_key_value.*called .*q_proj"):
        count_parameters(meta_model(tiny_llama()), lora_r=8, target_modules=["query_key_value"])

"""`plan`: against the paper's tables, PEFT's counts, torch's FLOP counter and live tensors."""

from __future__ import annotations

import io
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import head_masks
from rich.console import Console
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen3Config,
    ViTConfig,
)

from benchmarks.paper import headline, print_paper, table_12
from longlora_plugin.cli import longlora
from longlora_plugin.plan import (
    GPUS,
    ModelShape,
    Parameters,
    Training,
    count_parameters,
    find_gpu,
    fits,
    forward_flops,
    largest_sequence_len,
    memory,
    meta_model,
    plan_recipe,
    planned_run,
    shape_of,
    step_flops,
    step_flops_ratio,
)
from longlora_plugin.plan.flops import attended_pairs
from longlora_plugin.plan.memory import NF4_BYTES, OPTIMIZERS, saved_by_layer
from longlora_plugin.run.recipe import read_recipe

# Table 11 of the paper, Llama2-7B: length, full or S², attention, projections, FFN, others, total.
TABLE_11 = [
    (8192, "full", 35.2, 35.2, 70.9, 2.2, 143.5),
    (8192, "s2", 8.8, 35.2, 70.9, 2.2, 117.1),
    (16384, "full", 140.7, 70.4, 141.8, 4.3, 357.2),
    (16384, "s2", 35.2, 70.4, 141.8, 4.3, 251.7),
    (32768, "full", 562.9, 140.7, 283.7, 8.7, 996.0),
    (32768, "s2", 140.7, 140.7, 283.7, 8.7, 573.8),
    (65536, "full", 2251.8, 281.5, 567.4, 17.3, 3118.0),
    (65536, "s2", 562.9, 281.5, 567.4, 17.3, 1429.1),
]
# Table 12, peak GB a GPU.
TABLE_12 = [
    ("full", 8192, 46.3),
    ("full", 16384, 57.4),
    ("full", 32768, 68.8),
    ("full", 65536, None),
    ("lora", 8192, 25.7),
    ("lora", 16384, 34.7),
    ("lora", 32768, 46.5),
    ("lora", 65536, 71.1),
    ("longlora", 8192, 25.6),
    ("longlora", 16384, 34.6),
    ("longlora", 32768, 46.4),
    ("longlora", 65536, 69.8),
]
# DeepSpeed settings of the paper's code release: stage 2, buckets of 1e9, communication overlapped.
PAPER_ZERO_2 = {
    "zero_optimization": {"stage": 2, "reduce_bucket_size": 1e9, "overlap_comm": True},
    "bf16": {"enabled": "auto"},
}


@pytest.fixture(scope="module")
def llama_7b() -> Any:
    return meta_model(LlamaConfig())


@pytest.fixture(scope="module")
def shape_7b(llama_7b: Any) -> ModelShape:
    return shape_of(llama_7b)


def tiny_llama(**changes: Any) -> LlamaConfig:
    values = {
        "vocab_size": 500,
        "hidden_size": 64,
        "intermediate_size": 172,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return LlamaConfig(**{**values, **changes})


def llama(
    hidden: int, ffn: int, layers: int, heads: int, kv_heads: int, **changes: Any
) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, **changes,
    )  # fmt: skip


def write_recipe(folder: Path, config: Any, **keys: Any) -> Path:
    config.save_pretrained(folder / "base")
    recipe = folder / "recipe.yml"
    if "longlora" in keys or keys.get("adapter") == "longlora":
        keys = {"plugins": ["longlora_plugin.LongLoRAPlugin"], **keys}
    recipe.write_text(json.dumps({"base_model": str(folder / "base"), **keys}), encoding="utf-8")
    return recipe


# --- FLOPs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "kind", "attention", "projections", "ffn", "others", "total"), TABLE_11
)
def test_forward_flops_are_table_11_to_the_printed_digit(
    shape_7b: ModelShape, length: int, kind: str, attention: float, projections: float,
    ffn: float, others: float, total: float,
) -> None:  # fmt: skip
    counted = forward_flops(shape_7b, length, None if kind == "full" else length // 4).tera()
    assert round(counted["attention"], 1) == attention
    assert round(counted["projections"], 1) == projections
    assert round(counted["ffn"], 1) == ffn
    assert round(counted["others"], 1) == others
    # The paper adds up what it printed; the unrounded total may differ in the last digit.
    assert round(attention + projections + ffn + others, 1) == total
    assert counted["total"] == pytest.approx(total, abs=0.1)


@pytest.mark.parametrize(
    "config",
    [
        tiny_llama(),
        tiny_llama(num_key_value_heads=4, tie_word_embeddings=True),
        Qwen2Config(
            vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=1,
        ),
        GemmaConfig(
            vocab_size=300, hidden_size=48, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        ),
        GPTNeoXConfig(
            vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4,
        ),
    ],
    ids=["llama-gqa", "llama-tied", "qwen2", "gemma", "gpt-neox"],
)  # fmt: skip
def test_matrix_products_are_those_torch_counts(config: Any) -> None:
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    length = 48
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=torch.zeros(1, length, dtype=torch.long), use_cache=False)
    by_operation = {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}
    shape = shape_of(meta_model(config))
    counted = forward_flops(shape, length)
    # The only batched products besides attention's two are RoPE's outer product of frequencies.
    rope = 2 * length * (shape.rotary_dim // 2)
    assert by_operation["aten.bmm"] == counted.attention + rope
    head = 2 * length * config.vocab_size * config.hidden_size
    matrices = 2 * length * shape.ffn_weights + counted.projections + head
    assert by_operation.get("aten.mm", 0) + by_operation.get("aten.addmm", 0) == matrices


def test_query_and_key_norms_run_once_a_head() -> None:
    config = Qwen3Config(
        hidden_size=64, head_dim=32, num_attention_heads=4, num_key_value_heads=2,
        num_hidden_layers=3, intermediate_size=96, vocab_size=100,
    )  # fmt: skip
    assert shape_of(meta_model(config)).norm_elements == 7 * 64 + 3 * (4 + 2) * 32


def test_of_a_mixture_only_the_routed_experts_count() -> None:
    config = MixtralConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2,
    )  # fmt: skip
    router = 8 * 32
    assert shape_of(meta_model(config)).ffn_weights == 2 * (2 * 3 * 32 * 64 + router)


@settings(deadline=None, max_examples=30)
@given(
    length=st.integers(1, 40),
    half=st.integers(1, 12),
    heads=st.sampled_from([(1, 1), (3, 1), (4, 2), (5, 5), (6, 3)]),
)
def test_causal_pairs_are_those_of_the_definition(
    length: int, half: int, heads: tuple[int, int]
) -> None:
    query_heads, kv_heads = heads
    shape = plain_shape(heads=query_heads, kv_heads=kv_heads)
    counted = attended_pairs(shape, length, None, 2 * half, causal=True)
    assert counted == int(head_masks([length], 2 * half, query_heads, kv_heads).sum())
    full = attended_pairs(shape, length, None, None, causal=True)
    assert full == query_heads * int(torch.ones(length, length).tril().sum())


@settings(deadline=None, max_examples=30)
@given(length=st.integers(1, 40), window=st.integers(1, 50))
def test_a_sliding_window_limits_the_pairs_and_keeps_s2_out(length: int, window: int) -> None:
    counted = attended_pairs(plain_shape(heads=2), length, window, 8, causal=True)
    seen = torch.ones(length, length).tril() - torch.ones(length, length).tril(-window)
    assert counted == 2 * int(seen.sum())


def test_mistral_v01_slides_in_every_layer_so_s2_saves_nothing() -> None:
    shape = shape_of(meta_model(MistralConfig(num_hidden_layers=2)))
    assert shape.windows == (4096, 4096)
    assert forward_flops(shape, 32768, 8192) == forward_flops(shape, 32768)
    assert step_flops_ratio(shape, 32768, 8192) == 1


def test_only_the_full_layers_of_a_mixed_model_get_cheaper() -> None:
    config = Qwen2Config(
        num_hidden_layers=4, use_sliding_window=True, sliding_window=1024, max_window_layers=1,
        hidden_size=64, num_attention_heads=4, num_key_value_heads=4,
    )  # fmt: skip
    shape = shape_of(meta_model(config))
    assert shape.windows == (None, 1024, 1024, 1024)
    saved = forward_flops(shape, 8192).attention - forward_flops(shape, 8192, 2048).attention
    assert saved == 4 * 8192 * (8192 - 2048) * 64


def test_a_step_is_forward_recomputation_and_backward(shape_7b: ModelShape) -> None:
    forward = forward_flops(shape_7b, 4096, causal=True)
    frozen = step_flops(shape_7b, 4096)
    trained = step_flops(shape_7b, 4096, trains_base=True)
    kept = step_flops(shape_7b, 4096, checkpointing=False, flash=False)
    assert frozen.ffn == 3 * forward.ffn
    assert trained.ffn == 4 * forward.ffn
    assert kept.ffn == 2 * forward.ffn
    assert frozen.attention == 4.5 * forward.attention
    assert kept.attention == 3 * forward.attention
    lora = step_flops(shape_7b, 4096, lora_weights=1000)
    assert lora.projections - frozen.projections == 2 * 4096 * 1000 * 4


def test_the_planned_speed_up_follows_table_12(shape_7b: ModelShape) -> None:
    """Hours of LoRA over LongLoRA: 1.15, 1.24, 1.48, 1.77; FLOPs alone promise a little more."""
    hours = {8192: 6.0 / 5.2, 16384: 14.0 / 11.3, 32768: 36.5 / 24.6, 65536: 92.5 / 52.4}
    for length, measured in hours.items():
        planned = step_flops_ratio(shape_7b, length, length // 4)
        assert measured < planned < 1.16 * measured


# --- parameters ----------------------------------------------------------------------------------

FAMILIES = {
    "llama": (tiny_llama(), ["q_proj", "k_proj", "v_proj", "o_proj"]),
    "llama-tied": (tiny_llama(tie_word_embeddings=True), ["q_proj", "k_proj", "v_proj", "o_proj"]),
    "qwen2": (
        Qwen2Config(
            vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2,
        ),
        ["q_proj", "k_proj", "v_proj", "o_proj"],
    ),
    "gemma": (
        GemmaConfig(
            vocab_size=300, hidden_size=48, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        ),
        ["q_proj", "k_proj", "v_proj", "o_proj"],
    ),
    "gpt-neox": (
        GPTNeoXConfig(
            vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4,
        ),
        ["query_key_value", "dense"],
    ),
}  # fmt: skip
SAVED = {
    "gpt-neox": ["embed_in", "input_layernorm", "post_attention_layernorm", "final_layer_norm"],
}
LLAMA_SAVED = ["embed_tokens", "input_layernorm", "post_attention_layernorm", "norm"]


def counts_of_peft(config: Any, **lora: Any) -> tuple[int, int]:
    from peft import LoraConfig, get_peft_model

    model = AutoModelForCausalLM.from_config(config)
    tied = config.tie_word_embeddings and bool(lora.get("modules_to_save"))
    peft_model = get_peft_model(model, LoraConfig(**lora, ensure_weight_tying=tied))
    trained = sum(p.numel() for p in peft_model.parameters() if p.requires_grad)
    return trained, sum(p.numel() for p in peft_model.parameters()) - trained


@pytest.mark.parametrize("family", FAMILIES)
def test_adapter_longlora_trains_what_peft_trains(tmp_path: Path, family: str) -> None:
    config, targets = FAMILIES[family]
    recipe = read_recipe(write_recipe(tmp_path, config, adapter="longlora", sequence_len=256))
    planned = plan_recipe(recipe, config).parameters
    expected = counts_of_peft(
        config, r=8, target_modules=targets, modules_to_save=SAVED.get(family, LLAMA_SAVED)
    )
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
    counts = plan_recipe(read_recipe(recipe), LlamaConfig()).parameters
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


# --- memory --------------------------------------------------------------------------------------


def planned_gib(tmp_path: Path, run: str, length: int) -> Any:
    (tmp_path / "zero2.json").write_text(json.dumps(PAPER_ZERO_2))
    keys: dict[str, Any] = {
        "sequence_len": length,
        "gradient_checkpointing": True,
        "optimizer": "adamw_torch",
        "attn_implementation": "flash_attention_2",
        "deepspeed": str(tmp_path / "zero2.json"),
    }
    if run == "full":
        keys["longlora"] = {}
    else:
        keys |= {"adapter": "longlora", "longlora": {"shifted_attention": run == "longlora"}}
    recipe = read_recipe(write_recipe(tmp_path, LlamaConfig(), **keys))
    return plan_recipe(recipe, recipe.base_config(), gpu="a100-80gb", gpus=8)


@pytest.mark.parametrize(("run", "length", "paper"), TABLE_12)
def test_a_recipe_like_the_papers_needs_table_12s_memory(
    tmp_path: Path, run: str, length: int, paper: float | None
) -> None:
    plan = planned_gib(tmp_path, run, length)
    if paper is None:
        assert not plan.fits or plan.tight
        assert plan.memory["total"] > 80
    else:
        assert plan.fits
        assert plan.memory["total"] == pytest.approx(paper, rel=0.15)


def test_the_papers_stack_is_planned_within_nine_per_cent_and_out_of_memory_where_it_was() -> None:
    planned = {
        ({"full fine-tune": "full", "LoRA": "lora", "LongLoRA": "longlora"}[cell.run], cell.length):
        cell for cell in table_12()
    }  # fmt: skip
    for run, length, paper in TABLE_12:
        cell = planned[run, length]
        assert cell.paper == paper
        assert cell.fits == (paper is not None)
        if paper is not None:
            assert cell.planned == pytest.approx(paper, rel=0.09)


def test_7b_reaches_100k_13b_64k_and_70b_32k_on_eight_a100() -> None:
    answers = {(row.model, row.length): row.fits for row in headline()}
    assert answers == {("7B", 102400): True, ("13B", 65536): True, ("70B", 32768): True}


def test_nf4_takes_the_bytes_bitsandbytes_takes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(1024, 1024)
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    held = sum(
        tensor.numel() * tensor.element_size()
        for tensor in (packed, state.absmax, state.state2.absmax)
    )
    assert held / weight.numel() == NF4_BYTES
    assert pytest.approx(4.127, abs=0.001) == 8 * NF4_BYTES


def test_a_quantized_base_shrinks_its_linear_layers_only(
    shape_7b: ModelShape, llama_7b: Any
) -> None:
    counts = count_parameters(llama_7b, lora_r=8, target_modules=["q_proj"])
    linear = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert counts.quantizable == linear
    adapter = 4 * counts.lora
    rest = 2 * (counts.base - linear)
    plain, nf4, int8 = (
        memory(shape_7b, counts, Training(8192, quantization=kind)).weights - adapter
        for kind in (None, "nf4", "int8")
    )
    assert plain == 2 * counts.base
    assert nf4 == pytest.approx(rest + linear * 0.515869, rel=1e-6)
    assert int8 == rest + linear + 4 * 32 * (4 * 4096 + 2 * 11008 + 4096)


class LiveTensors(TorchDispatchMode):
    """Bytes of all tensors that operations have made and that are still alive, and their peak."""

    def __init__(self, known: Any) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.sizes = {tensor.untyped_storage()._cdata: 0 for tensor in known}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self.sizes:
                    self.sizes[key] = storage.nbytes()
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._free, key)
        return out

    def _free(self, key: int) -> None:
        self.now -= self.sizes.pop(key, 0)


def peak_of_a_step(
    config: Any, length: int, *, adapter: bool, checkpointing: bool, group_size: int | None = None
) -> int:
    """Peak bytes of activations of a bf16 training step; weights and gradients are not in it."""
    from peft import LoraConfig, get_peft_model

    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(torch.bfloat16)
    if adapter:
        lora = LoraConfig(
            r=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
            modules_to_save=LLAMA_SAVED,
        )  # fmt: skip
        model = get_peft_model(model, lora, autocast_adapter_dtype=False)
        model.enable_input_require_grads()
    if checkpointing:
        model.gradient_checkpointing_enable()
    if group_size:
        from longlora_plugin.attention import enable_shifted_attention

        enable_shifted_attention(model, group_size=group_size)
    model.train()
    known = [*model.parameters(), *model.buffers()]
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
            known.append(parameter.grad)
    tokens = torch.randint(0, config.vocab_size, (1, length))
    with LiveTensors(known) as live:
        model(input_ids=tokens, labels=tokens, use_cache=False)["loss"].backward()
    return live.peak


@pytest.mark.parametrize("adapter", [True, False], ids=["adapter", "full"])
@pytest.mark.parametrize("checkpointing", [True, False], ids=["checkpointing", "kept"])
@pytest.mark.parametrize("vocab", [64, 4000], ids=["layer-bound", "loss-bound"])
@pytest.mark.parametrize("group_size", [None, 256], ids=["full-attention", "s2"])
def test_activations_are_those_a_real_step_holds(
    adapter: bool, checkpointing: bool, vocab: int, group_size: int | None
) -> None:
    config = tiny_llama(
        vocab_size=vocab, hidden_size=128, intermediate_size=352, num_hidden_layers=6
    )
    length = 1024
    measured = peak_of_a_step(
        config, length, adapter=adapter, checkpointing=checkpointing, group_size=group_size
    )
    model = meta_model(config)
    lora = {"lora_r": 8, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
    counts = count_parameters(model, **(lora if adapter else {}))
    training = Training(length, checkpointing=checkpointing, shifted_copies=group_size is not None)
    plan = memory(shape_of(model), counts, training)
    assert plan.activations + plan.loss + plan.layer == pytest.approx(measured, rel=0.03)


def plain_shape(**changes: Any) -> ModelShape:
    values = {
        "hidden": 512, "vocab": 1000, "layers": 4, "heads": 8, "head_dim": 64, "value_dim": 64,
        "rotary_dim": 64, "windows": (None,) * 4, "projection_weights": 4 * 4 * 512**2,
        "ffn_weights": 4 * 3 * 512 * 1376, "head_weights": 512 * 1000, "norm_elements": 9 * 512,
    }  # fmt: skip
    values |= {"kv_heads": changes.get("heads", 8), **changes}
    return ModelShape(**values)


PARAMETERS = Parameters(
    base=13_000_000, lora=200_000, copies=500_000, trained_base=0, quantizable=12_000_000,
    quantizable_rows=20_000, largest_matrix=700_000, largest_unit=3_000_000,
    outside_layers=1_000_000,
)  # fmt: skip
FULL = Parameters(
    base=13_000_000, lora=0, copies=0, trained_base=13_000_000, quantizable=12_000_000,
    quantizable_rows=20_000, largest_matrix=700_000, largest_unit=3_000_000,
    outside_layers=1_000_000,
)  # fmt: skip
runs = st.builds(
    Training,
    sequence_len=st.integers(1, 200_000),
    micro_batch_size=st.integers(1, 8),
    gpus=st.integers(1, 64),
    compute_bytes=st.sampled_from([2, 4]),
    quantization=st.sampled_from([None, "nf4", "int8"]),
    checkpointing=st.booleans(),
    optimizer=st.sampled_from(sorted(OPTIMIZERS)),
    engine=st.sampled_from(["ddp", "deepspeed", "fsdp"]),
    loss=st.sampled_from(["full", "chunked", "fused"]),
    dense_mask=st.booleans(),
    shifted_copies=st.booleans(),
)


@settings(deadline=None, max_examples=100)
@given(run=runs, more=st.integers(1, 10_000), counts=st.sampled_from([PARAMETERS, FULL]))
def test_a_longer_row_never_costs_less(run: Training, more: int, counts: Parameters) -> None:
    shape = plain_shape()
    values = vars(run)
    longer = Training(**{**values, "sequence_len": run.sequence_len + more})
    assert memory(shape, counts, longer).total >= memory(shape, counts, run).total
    assert memory(shape, counts, longer).needed >= memory(shape, counts, run).needed
    for causal in (True, False):
        short = forward_flops(shape, run.sequence_len, 512, causal=causal)
        long = forward_flops(shape, longer.sequence_len, 512, causal=causal)
        assert long.total > short.total


@settings(deadline=None, max_examples=100)
@given(length=st.integers(2, 100_000), share=st.floats(0.01, 1), kv=st.sampled_from([1, 2, 8]))
def test_s2_never_costs_more_than_full_attention(length: int, share: float, kv: int) -> None:
    shape = plain_shape(kv_heads=kv)
    group = max(2, int(length * share) // 2 * 2)
    for causal in (True, False):
        full = forward_flops(shape, length, causal=causal)
        sparse = forward_flops(shape, length, group, causal=causal)
        assert sparse.attention <= full.attention
        assert (sparse.projections, sparse.ffn, sparse.others) == (
            full.projections, full.ffn, full.others,
        )  # fmt: skip
    assert step_flops_ratio(shape, length, group) >= 1


@settings(deadline=None, max_examples=100)
@given(run=runs, counts=st.sampled_from([PARAMETERS, FULL]))
def test_each_zero_stage_holds_no_more_than_the_one_before(
    run: Training, counts: Parameters
) -> None:
    held = []
    for stage in (0, 1, 2, 3):
        values = {**vars(run), "engine": "deepspeed", "zero_stage": stage}
        plan = memory(plain_shape(), counts, Training(**values))
        # In whole bytes: the parts are floats, whose sums differ in the last bit.
        held.append(round(plan.total - plan.buffers))
    assert held == sorted(held, reverse=True)


def test_zero_3_of_a_large_model_is_smaller_than_zero_2_with_all_its_buffers(
    shape_7b: ModelShape, llama_7b: Any
) -> None:
    counts = count_parameters(llama_7b)
    totals = [
        memory(shape_7b, counts, Training(8192, gpus=8, engine="deepspeed", zero_stage=stage)).total
        for stage in (0, 1, 2, 3)
    ]
    assert totals == sorted(totals, reverse=True)


@settings(deadline=None, max_examples=50)
@given(run=runs)
def test_the_parts_add_up_and_needed_leaves_out_fragments(run: Training) -> None:
    gib = memory(plain_shape(), PARAMETERS, run).gib()
    total, needed = gib.pop("total"), gib.pop("needed")
    assert sum(gib.values()) == pytest.approx(total)
    assert needed == pytest.approx(total - gib["fragments"])
    assert min(gib.values()) >= 0


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"checkpointing": True}, "activations"),
        ({"offload_activations": True}, "activations"),
        ({"loss": "fused"}, "loss"),
        ({"loss": "chunked"}, "loss"),
        ({"optimizer": "adamw_8bit"}, "optimizer"),
        ({"optimizer": "lion"}, "optimizer"),
        ({"quantization": "nf4"}, "weights"),
        ({"offload_optimizer": True}, "optimizer"),
        ({"offload_weights": True}, "weights"),
    ],
)
def test_what_saves_memory_saves_it_where_it_should(change: dict[str, Any], part: str) -> None:
    base = Training(8192, checkpointing=False)
    before = memory(plain_shape(), PARAMETERS, base)
    after = memory(plain_shape(), PARAMETERS, Training(**{**vars(base), **change}))
    assert getattr(after, part) < getattr(before, part)
    assert after.total < before.total


def test_stored_scores_of_eager_attention_grow_with_the_square(shape_7b: ModelShape) -> None:
    def layer(length: int) -> float:
        run = Training(length, scores_width=length, loss="fused")
        return memory(shape_7b, PARAMETERS, run).layer

    assert 3.5 < layer(32768) / layer(16384) < 4.0
    assert saved_by_layer(shape_7b, adapter=True) < saved_by_layer(shape_7b, adapter=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizer": "adamx"}, "optimizer: got 'adamx'; allowed: adamw"),
        ({"loss": "big"}, "loss: got 'big'; allowed: full, chunked, fused"),
        ({"quantization": "fp4"}, "quantization: got 'fp4'"),
        ({"gpus": 0}, "gpus: got 0; it must be at least 1"),
    ],
)
def test_values_that_cannot_be_planned_are_errors(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        memory(plain_shape(), PARAMETERS, Training(**{"sequence_len": 512, **change}))


# --- GPUs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "size"), [("48gb", 48), ("48", 48), ("11.5GiB", 11.5)])
def test_a_plain_size_is_a_gpu(name: str, size: float) -> None:
    assert find_gpu(name).memory == size


def test_an_unknown_gpu_is_an_error_naming_the_valid_ones() -> None:
    with pytest.raises(ValueError, match=r"a100-40gb or a100-80gb\?.*mi300x-192gb"):
        find_gpu("a100")
    assert find_gpu("A100_80GB") is GPUS["a100-80gb"]


def test_the_largest_length_fits_and_the_next_one_does_not(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, LlamaConfig(), adapter="longlora", gradient_checkpointing=True)
    run = planned_run(read_recipe(recipe), LlamaConfig(), gpus=8)
    for card in (GPUS["a100-40gb"], GPUS["h200-141gb"]):
        longest = largest_sequence_len(run, card)
        assert longest % 256 == 0
        assert longest > 4096
        assert fits(run.memory_at(longest), card)
        assert not fits(run.memory_at(longest + 256), card)
    assert largest_sequence_len(run, GPUS["t4-16gb"]) == 0


# --- recipes -------------------------------------------------------------------------------------


def training_for(tmp_path: Path, gpus: int = 4, **keys: Any) -> tuple[Training, tuple[str, ...]]:
    run = planned_run(read_recipe(write_recipe(tmp_path, tiny_llama(), **keys)), tiny_llama(), gpus)
    return run.training, run.notes


def test_an_empty_recipe_means_axolotls_defaults(tmp_path: Path) -> None:
    training, notes = training_for(tmp_path)
    assert training == Training(
        sequence_len=512, gpus=4, checkpointing=False, optimizer="adamw", engine="ddp"
    )
    assert notes == ()


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"bf16": False}, {"compute_bytes": 4}),
        ({"bf16": False, "fp16": True}, {"compute_bytes": 2}),
        ({"adapter": "qlora", "load_in_4bit": True, "lora_target_linear": True},
         {"quantization": "nf4"}),
        ({"adapter": "longlora", "load_in_8bit": True}, {"quantization": "int8"}),
        ({"gradient_checkpointing": "offload"},
         {"checkpointing": True, "offload_activations": True}),
        ({"gradient_checkpointing": True, "activation_offloading": True},
         {"checkpointing": True, "offload_activations": True}),
        ({"optimizer": "paged_adamw_8bit"}, {"optimizer": "adamw_8bit"}),
        ({"optimizer": "adamw_torch"}, {"optimizer": "adamw", "optimizer_temporaries": 1}),
        ({"optimizer": "lion_8bit"}, {"optimizer": "lion_8bit"}),
        ({"optimizer": "adafactor"}, {"optimizer": "adafactor"}),
        ({"liger_fused_linear_cross_entropy": True}, {"loss": "fused"}),
        ({"chunked_cross_entropy": True}, {"loss": "chunked"}),
        ({"plugins": ["axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin"]},
         {"loss": "fused"}),
        ({"deepspeed": "deepspeed_configs/zero1.json"}, {"engine": "deepspeed", "zero_stage": 1}),
        ({"deepspeed": "deepspeed_configs/zero3_bf16.json"},
         {"zero_stage": 3, "bucket_elements": None, "offload_weights": False}),
        ({"deepspeed": "deepspeed_configs/zero3_bf16_cpuoffload_params.json"},
         {"zero_stage": 3, "offload_weights": True, "offload_optimizer": False}),
        ({"deepspeed": "zero3_bf16_cpuoffload_all.json"},
         {"zero_stage": 3, "offload_weights": True, "offload_optimizer": True}),
        ({"fsdp_version": 2, "fsdp_config": {"offload_params": False}},
         {"engine": "fsdp", "zero_stage": 3, "offload_weights": False}),
        ({"fsdp_version": 2, "fsdp_config": {"offload_params": True,
                                             "reshard_after_forward": False}},
         {"engine": "fsdp", "zero_stage": 2, "offload_weights": True}),
        ({"sample_packing": True}, {"dense_mask": True}),
        ({"sample_packing": True, "longlora": {"full_attention_steps": 0}},
         {"dense_mask": False, "shifted_copies": True}),
        ({"sample_packing": True, "longlora": {}}, {"dense_mask": True, "shifted_copies": True}),
        ({"sample_packing": True, "flash_attention": True}, {"dense_mask": False}),
    ],
)  # fmt: skip
def test_a_recipes_keys_reach_the_memory_model(
    tmp_path: Path, keys: dict[str, Any], expected: dict[str, Any]
) -> None:
    training, _ = training_for(tmp_path, **keys)
    assert {name: getattr(training, name) for name in expected} == expected


def test_a_deepspeed_file_is_read_where_it_exists(tmp_path: Path) -> None:
    zero = {"stage": 2, "offload_optimizer": {"device": "cpu"}, "reduce_bucket_size": 5e7}
    (tmp_path / "mine.json").write_text(json.dumps({"zero_optimization": zero}))
    training, notes = training_for(tmp_path, deepspeed="mine.json")
    assert (training.zero_stage, training.offload_optimizer) == (2, True)
    assert (training.bucket_elements, training.buckets) == (50_000_000, 1)
    assert notes == ()


def test_a_deepspeed_file_that_is_nowhere_is_noted_or_an_error(tmp_path: Path) -> None:
    _, notes = training_for(tmp_path, deepspeed="deepspeed_configs/zero2.json")
    assert "planned by its name as ZeRO-2 without offload" in notes[0]
    with pytest.raises(ValueError, match=r"deepspeed: mine\.json does not exist.*axolotl fetch"):
        training_for(tmp_path, deepspeed="mine.json")


def test_an_unknown_optimizer_and_parallelism_are_noted(tmp_path: Path) -> None:
    _, notes = training_for(tmp_path, optimizer="brand_new", tensor_parallel_size=2)
    assert "optimizer: brand_new is not known here" in notes[0]
    assert "tensor_parallel_size: 2 is not modelled" in notes[1]


def test_eager_attention_stores_the_scores_of_its_groups_only(tmp_path: Path) -> None:
    def run(**keys: Any) -> Any:
        path = write_recipe(tmp_path, tiny_llama(), attn_implementation="eager", **keys)
        return planned_run(read_recipe(path), tiny_llama())

    full, s2 = run(), run(longlora={"full_attention_steps": 0})
    last_steps = run(longlora={})
    layers = [plan.memory_at(8192).layer for plan in (full, s2, last_steps)]
    assert layers[0] == layers[2]
    assert 3.5 < layers[0] / layers[1] < 4.5


def test_the_last_full_attention_steps_lower_the_speed_up_of_the_run(tmp_path: Path) -> None:
    block = {"full_attention_steps": 0.25}
    keys = {"adapter": "longlora", "sequence_len": 65536, "longlora": block}
    plan = plan_recipe(read_recipe(write_recipe(tmp_path, LlamaConfig(), **keys)), LlamaConfig())
    assert plan.speedup_run == pytest.approx(1 / (0.25 + 0.75 / plan.speedup))
    assert 1 < plan.speedup_run < plan.speedup


def test_rows_below_full_attention_below_are_planned_with_full_attention(tmp_path: Path) -> None:
    block = {"full_attention_below": 8192}
    keys = {"sequence_len": 8192, "longlora": block}
    plan = plan_recipe(read_recipe(write_recipe(tmp_path, tiny_llama(), **keys)), tiny_llama())
    assert plan.group_size is None
    assert plan.speedup == 1


# --- the command ---------------------------------------------------------------------------------


def invoke(*arguments: Any) -> Any:
    return CliRunner().invoke(longlora, ["plan", *map(str, arguments)])


def test_the_command_writes_json_and_a_picture(tmp_path: Path) -> None:
    recipe = write_recipe(
        tmp_path, tiny_llama(), adapter="longlora", sequence_len=4096, gradient_checkpointing=True
    )
    figures, picture = tmp_path / "plan.json", tmp_path / "plan.png"
    result = invoke(
        recipe, "--gpu", "rtx4090-24gb", "--gpus", 2, "--json", figures, "--plot", picture
    )
    assert result.exit_code == 0, result.output
    assert "fits 2 × rtx4090-24gb" in result.output
    written = json.loads(figures.read_text())
    assert written["parameters"]["trained"] == written["parameters"]["lora"] + (500 + 7) * 64
    for kind in ("full", "s2"):
        parts = written["flops"][kind]
        assert parts.pop("total") == pytest.approx(sum(parts.values()))
        assert set(parts) == {"attention", "projections", "ffn", "others"}
    assert written["fits"] is True
    assert written["group_size"] == 1024
    assert written["largest_sequence_len"] > written["comfortable_sequence_len"] > 4096
    assert written["speedup"] > 1
    assert written["memory"]["total"] > written["memory"]["needed"]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_run_whose_fragments_do_not_fit_is_called_tight(tmp_path: Path) -> None:
    recipe = write_recipe(
        tmp_path, LlamaConfig(), adapter="longlora", sequence_len=32768,
        gradient_checkpointing=True, load_in_4bit=True,
    )  # fmt: skip
    result = invoke(recipe, "--gpu", "32gb", "--json", tmp_path / "plan.json")
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["memory"]["needed"] < 32 < written["memory"]["total"]
    assert (written["fits"], written["tight"]) == (True, True)
    assert written["comfortable_sequence_len"] < 32768 <= written["largest_sequence_len"]
    assert "may just fit 1 × 32gb" in result.output


def test_a_recipe_that_does_not_fit_says_so_and_exits_with_0(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, LlamaConfig(), sequence_len=65536)
    result = invoke(recipe, "--gpu", "24gb", "--json", tmp_path / "plan.json")
    assert result.exit_code == 0, result.output
    assert "does not fit 1 × 24gb" in result.output
    written = json.loads((tmp_path / "plan.json").read_text())
    assert (written["fits"], written["largest_sequence_len"]) == (False, 0)


def test_without_a_gpu_every_known_one_is_answered(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_llama())
    result = invoke(recipe, "--json", tmp_path / "plan.json")
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["sequence_len"] == 512
    assert written["fits"] is None
    assert [row["gpu"] for row in written["by_gpu"]] == list(GPUS)


def test_the_papers_page_prints_both_tables_and_the_answer() -> None:
    out = Console(file=io.StringIO(), width=120)
    figures = print_paper(out)
    printed = out.file.getvalue()
    assert printed.count("the same") == 8
    assert "out of memory" in printed
    assert "102400" in printed
    assert len(figures["table_12"]) == 12
    assert [goal["fits"] for goal in figures["reach"]] == [True, True, True]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing argument 'RECIPE'"),
        (["nowhere.yml"], "cannot read recipe nowhere.yml"),
    ],
)
def test_a_command_line_that_cannot_work_is_an_error(arguments: list[str], message: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code != 0
    assert message in result.output


def test_an_unknown_gpu_or_base_is_a_clean_error(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_llama())
    result = invoke(recipe, "--gpu", "voodoo2")
    assert result.exit_code == 1
    assert "unknown GPU 'voodoo2'" in result.output
    recipe.write_text("base_model: ./not-here\n")
    result = invoke(recipe)
    assert result.exit_code == 1
    assert "base_model: the folder ./not-here does not exist" in result.output
    assert "Traceback" not in result.output

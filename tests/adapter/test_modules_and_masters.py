"""Which modules train beside LoRA, and that they really do in bf16."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from longlora_plugin.adapter import fp32_weights, fused_loss
from longlora_plugin.adapter.fp32_weights import train_in_fp32
from longlora_plugin.adapter.modules import (
    attention_projections,
    embedding_modules,
    embeddings_are_tied,
    norm_modules,
    shortest_names,
)

TINY = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
FAMILIES = {
    "llama": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
    "gpt_neox": {},
    "phi3": {"num_key_value_heads": 2, "pad_token_id": 0},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 8},
    "cohere": {"num_key_value_heads": 2, "use_qk_norm": True},
}


def build(family: str, dtype=torch.float32, **overrides):
    """A model with the same weights in every dtype; each dtype draws random numbers of its own."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**TINY, **FAMILIES[family], **overrides})
    drawn = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if dtype == torch.float32:
        return drawn
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.load_state_dict(drawn.state_dict())
    return model


def with_adapter(model, **options):
    names = [*embedding_modules(model), *norm_modules(model)]
    config = LoraConfig(
        r=4,
        target_modules=attention_projections(model),
        modules_to_save=shortest_names(model, names),
        ensure_weight_tying=embeddings_are_tied(model),
        task_type="CAUSAL_LM",
        **options,
    )
    return get_peft_model(model, config)


def trained_names(peft_model) -> set[str]:
    return {
        name.replace(".modules_to_save.default", "").removeprefix("base_model.model.")
        for name, parameter in peft_model.named_parameters()
        if parameter.requires_grad and "lora_" not in name
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_exactly_embeddings_and_norms_are_trained_in_every_family(family):
    model = build(family)
    # Independent of module classes: vectors that start as ones (or Gemma's zeros) and the table.
    expected = {
        name
        for name, _ in model.named_parameters()
        if "norm" in name.lower() or name.endswith(("embed_tokens.weight", "embed_in.weight"))
    }
    tied = embeddings_are_tied(model)
    peft_model = with_adapter(model)
    assert trained_names(peft_model) == expected
    assert embeddings_are_tied(peft_model.base_model.model) == tied


def test_norm_of_every_family_is_found_whatever_its_name():
    assert norm_modules(build("gpt_neox"))[-1] == "gpt_neox.final_layer_norm"
    assert "model.layers.0.self_attn.q_norm" in norm_modules(build("qwen3"))


def test_short_names_are_kept_only_where_they_select_the_same_modules():
    model = build("qwen3")
    names = norm_modules(model)
    assert "input_layernorm" in shortest_names(model, names)
    final_only = ["model.norm"]
    assert shortest_names(model, final_only) == final_only


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "phi3"])
def test_attention_projections_are_found_whatever_their_name(family):
    expected = {
        "llama": ["k_proj", "o_proj", "q_proj", "v_proj"],
        "gpt_neox": ["dense", "query_key_value"],
        "phi3": ["o_proj", "qkv_proj"],
    }
    assert attention_projections(build(family)) == expected[family]


def train_steps(model, steps: int, lr: float = 2e-5) -> None:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    tokens = torch.randint(0, 97, (2, 16))
    for _ in range(steps):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma2"])
def test_norms_move_in_bf16_at_the_papers_learning_rate(family):
    base = {k: v.clone() for k, v in build(family, torch.bfloat16).named_parameters()}
    model = with_adapter(build(family, torch.bfloat16))
    trained = train_in_fp32(model)
    assert trained.dtype == torch.float32
    assert trained.compute_dtype == torch.bfloat16
    train_steps(model, 10)
    for name, parameter in model.named_parameters():
        plain = name.replace(".modules_to_save.default", "").removeprefix("base_model.model.")
        if parameter.requires_grad and "norm" in name.lower():
            assert parameter.dtype == torch.float32
            moved = (parameter != base[plain].float()).float().mean()
            assert moved > 0.9, name


def test_without_masters_bf16_norms_do_not_move():
    """The bug this guards against, so that the test above can fail."""
    model = with_adapter(build("llama", torch.bfloat16))
    norms = {n: p.clone() for n, p in model.named_parameters() if "norm" in n and p.requires_grad}
    train_steps(model, 10)
    assert all(torch.equal(p, norms[n]) for n, p in model.named_parameters() if n in norms)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma2"])
def test_activations_stay_in_the_compute_dtype(family):
    model = with_adapter(build(family, torch.bfloat16))
    tokens = torch.randint(0, 97, (1, 8))
    before = model(input_ids=tokens).logits
    train_in_fp32(model)
    seen = {}
    for name, module in model.named_modules():
        if type(module).__name__.endswith("Attention"):
            module.register_forward_pre_hook(
                lambda m, args, kwargs, name=name: seen.update(
                    {name: (kwargs.get("hidden_states", args[0] if args else None)).dtype}
                ),
                with_kwargs=True,
            )
    after = model(input_ids=tokens).logits
    assert set(seen.values()) == {torch.bfloat16}
    assert len(seen) == 2
    torch.testing.assert_close(after.float(), before.float(), atol=0.05, rtol=0.05)


def masters_that_upcast_activations(model):
    """Another way to train fp32 norms: input cast to fp32, output cast back."""
    kinds = {module: type(module) for module in model.modules()}
    train_in_fp32(model)
    for module, kind in kinds.items():
        if type(module) is not kind:
            module.__class__ = kind
            module.register_forward_pre_hook(lambda _, args: (args[0].float(), *args[1:]))


def updates_of_20_steps(family, dtype, prepare) -> dict[str, torch.Tensor]:
    model = with_adapter(build(family, dtype))
    prepare(model)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad and "lora" not in n}
    first = {name: p.detach().clone() for name, p in trained.items()}
    torch.manual_seed(1)
    train_steps(model, 20, lr=1e-3)
    return {name: (p - first[name]).double() for name, p in trained.items()}


def relative_error(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    norms = [name for name in wanted if "norm" in name]
    error = sum((got[n] - wanted[n]).square().sum() for n in norms)
    return (error / sum(wanted[n].square().sum() for n in norms)).sqrt().item()


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma2", "qwen3"])
def test_20_steps_with_weights_cast_train_norms_as_near_to_fp32_as_activations_upcast(family):
    wanted = updates_of_20_steps(family, torch.float32, train_in_fp32)
    ours = updates_of_20_steps(family, torch.bfloat16, train_in_fp32)
    upcast = updates_of_20_steps(family, torch.bfloat16, masters_that_upcast_activations)
    errors = [relative_error(*pair) for pair in ((ours, wanted), (upcast, wanted), (ours, upcast))]
    assert errors[0] < 1.2 * errors[1]
    assert errors[2] < 0.03


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma2"])
def test_a_fused_norm_is_given_activations_and_weights_in_the_compute_dtype(family, monkeypatch):
    seen = set()
    model = with_adapter(build(family, torch.bfloat16))
    norm = next(
        module
        for name, module in model.named_modules()
        if "norm" in name and name.endswith("modules_to_save.default")
    )
    kind = type(norm)
    train_in_fp32(model)

    def fused(self, x):
        seen.update({x.dtype, *(getattr(self, name).dtype for name, _ in self.named_parameters())})
        return x * self.weight

    monkeypatch.setattr(kind, "forward", fused)
    tokens = torch.randint(0, 97, (1, 8))
    model(input_ids=tokens, labels=tokens).loss.backward()
    assert seen == {torch.bfloat16}
    assert {p.dtype for n, p in model.named_parameters() if "norm" in n and p.requires_grad} == {
        torch.float32
    }
    assert norm.weight.grad.dtype == torch.float32


def test_a_compiled_norm_trains_its_fp32_weight():
    norm = torch.nn.LayerNorm(8).bfloat16().float()
    fp32_weights._read_in(norm, torch.bfloat16)
    x = torch.randn(4, 8, dtype=torch.bfloat16)
    compiled = torch.compile(norm, backend="eager", fullgraph=True)
    compiled(x).sum().backward()
    assert norm.weight.grad.dtype == torch.float32
    with torch.no_grad():
        norm.weight.fill_(3.0)
    torch.testing.assert_close(compiled(x), norm(x))


def test_outside_its_forward_pass_a_norms_weight_is_the_parameter_that_fsdp2_looks_up():
    model = with_adapter(build("llama", torch.bfloat16))
    train_in_fp32(model)
    tokens = torch.randint(0, 97, (1, 8))
    model(input_ids=tokens, labels=tokens).loss.backward()
    for name, parameter in model.named_parameters():
        owner, _, attribute = name.rpartition(".")
        assert getattr(model.get_submodule(owner), attribute) is parameter


# ---- a tied head and Cut Cross Entropy ----------------------------------------------------


@pytest.fixture
def cut_cross_entropy(monkeypatch):
    """Its entry: as the kernel, one dtype only; as Axolotl's fork, looked up at each call."""
    entry = ModuleType(fused_loss.ENTRY_MODULE)

    def linear_cross_entropy(e, c, targets, shift=False):
        assert e.dtype == c.dtype, "Both operands must be same dtype"
        return torch.nn.functional.cross_entropy((e @ c.T).float().flatten(0, 1), targets.flatten())

    entry.linear_cross_entropy = linear_cross_entropy
    monkeypatch.setitem(sys.modules, fused_loss.ENTRY_MODULE, entry)
    return entry


def test_cut_cross_entropy_trains_a_tied_fp32_head_in_bf16(cut_cross_entropy):
    model = with_adapter(build("llama", torch.bfloat16, tie_word_embeddings=True))
    train_in_fp32(model)
    base, tokens = model.base_model.model, torch.randint(0, 97, (2, 8))

    def loss():
        states = base.model(input_ids=tokens).last_hidden_state
        return cut_cross_entropy.linear_cross_entropy(states, base.lm_head.weight, tokens)

    with pytest.raises(AssertionError, match="same dtype"):
        loss()
    restore = fused_loss.cast_heads_for_cut_cross_entropy()
    loss().backward()
    restore()
    weight = base.model.embed_tokens.modules_to_save["default"].weight
    got = weight.grad.clone()
    weight.grad = None
    logits = base(input_ids=tokens).logits.float().flatten(0, 1)
    torch.nn.functional.cross_entropy(logits, tokens.flatten()).backward()
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, weight.grad, atol=1e-3, rtol=2e-2)
    with pytest.raises(AssertionError, match="same dtype"):
        loss()


def test_without_cut_cross_entropy_nothing_is_patched():
    fused_loss.cast_heads_for_cut_cross_entropy()()
    assert fused_loss.ENTRY_MODULE not in sys.modules


def test_fp32_runs_are_left_as_they_are():
    model = with_adapter(build("llama"))
    tokens = torch.randint(0, 97, (1, 8))
    before = model(input_ids=tokens).logits
    train_in_fp32(model)
    assert torch.equal(model(input_ids=tokens).logits, before)


@pytest.mark.parametrize("tied", [True, False])
def test_stock_peft_loads_what_was_trained(tmp_path, tied):
    model = with_adapter(build("llama", torch.bfloat16, tie_word_embeddings=tied))
    train_in_fp32(model)
    train_steps(model, 5, lr=1e-2)
    model.save_pretrained(tmp_path)
    tokens = torch.randint(0, 97, (1, 12))

    stock = PeftModel.from_pretrained(
        build("llama", torch.float32, tie_word_embeddings=tied), tmp_path
    )
    ours = {
        k: v.float() for k, v in model.state_dict().items() if "modules_to_save" in k or "lora" in k
    }
    theirs = stock.state_dict()
    assert all(torch.equal(theirs[k].float(), v) for k, v in ours.items())
    with torch.no_grad():
        torch.testing.assert_close(
            stock(input_ids=tokens).logits,
            model(input_ids=tokens).logits.float(),
            atol=0.05,
            rtol=0.05,
        )
    merged = stock.merge_and_unload()
    head, table = merged.get_output_embeddings().weight, merged.get_input_embeddings().weight
    assert torch.equal(head, table) == tied

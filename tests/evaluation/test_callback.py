"""The callback: what it logs is full-attention perplexity, and training does not notice it."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from evaluation_models import ORIGINAL, write_tiny_llama
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from longlora_plugin.attention import enable_shifted_attention
from longlora_plugin.evaluation.callback import (
    LongContextCallback,
    evaluation_mode,
    held_out_windows,
    own_rope,
)
from longlora_plugin.evaluation.windows import default_bucket_edges

LENGTH = 4 * ORIGINAL


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_tiny_llama(tmp_path_factory.mktemp("callback") / "base")


@pytest.fixture(scope="module")
def windows():
    return torch.randint(3, 250, (3, LENGTH), generator=torch.Generator().manual_seed(0))


TARGETS = ["q_proj", "v_proj"]


class AtStep:
    def __init__(self, step):
        self.global_step = step


def with_linear_rope(base):
    config = LlamaConfig.from_pretrained(base)
    config.rope_parameters = {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}
    config.max_position_embeddings = LENGTH
    return LlamaForCausalLM.from_pretrained(base, config=config)


def extended(base, seed=0):
    model = with_linear_rope(base)
    torch.manual_seed(seed)
    lora = LoraConfig(
        r=2,
        lora_dropout=0.1,
        target_modules=TARGETS,
        modules_to_save=["embed_tokens", "norm"],
        ensure_weight_tying=True,
    )
    return get_peft_model(model, lora)


def callback(windows, logged, **options):
    options = {"every_steps": 2, "base_context": ORIGINAL} | options
    return LongContextCallback(windows, log=logged.append, **options)


def train(model, folder, callbacks, steps=3, learning_rate=1e-2):
    rows = torch.randint(3, 250, (8, LENGTH), generator=torch.Generator().manual_seed(1))
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=1,
        learning_rate=learning_rate,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        seed=3,
    )
    data = [{"input_ids": row, "labels": row} for row in rows]
    Trainer(model, arguments, train_dataset=data, callbacks=callbacks).train()
    return {name: value.clone() for name, value in model.state_dict().items()}


def own_losses(model, windows):
    with torch.no_grad():
        logits = model.eval()(windows).logits
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), windows[:, 1:], reduction="none").mean(0)


def test_logged_figures_equal_full_attention_perplexity_by_position(base, windows, tmp_path):
    model, logged = extended(base), []
    handle = enable_shifted_attention(model, group_size=64)
    train(model, tmp_path, [callback(windows, logged)], steps=2)
    handle.remove()
    measured = [figures for figures in logged if "long_context/perplexity" in figures]
    assert len(measured) == 1
    plain = extended(base)
    plain.load_state_dict(model.state_dict())
    losses = own_losses(plain, windows)
    expected = {"long_context/perplexity": losses.mean().exp().item()}
    for low, high in pairwise(default_bucket_edges(LENGTH, ORIGINAL)):
        name = f"long_context/perplexity_{low}-{high}"
        expected[name] = losses[low:high].mean().exp().item()
    assert measured[0] == pytest.approx(expected, rel=1e-4)
    assert all(module.training for module in model.modules())


def test_measures_every_n_steps_and_once_at_the_end(base, windows, tmp_path):
    logged = []
    train(extended(base), tmp_path, [callback(windows, logged, every_steps=2)], steps=5)
    assert sum("long_context/perplexity" in figures for figures in logged) == 3
    logged.clear()
    train(extended(base), tmp_path, [callback(windows, logged, every_steps=2)], steps=4)
    assert sum("long_context/perplexity" in figures for figures in logged) == 2


def test_training_is_bit_for_bit_the_same_with_the_callback(base, windows, tmp_path):
    plain = train(extended(base), tmp_path, [])
    config = LlamaConfig.from_pretrained(base)
    watched = train(
        extended(base), tmp_path, [callback(windows, [], every_steps=1, base_config=config)]
    )
    assert plain.keys() == watched.keys()
    assert all(torch.equal(plain[name], watched[name]) for name in plain)
    untrained = extended(base).state_dict()
    assert sum(not torch.equal(plain[name], untrained[name]) for name in plain) > 5


@pytest.mark.parametrize("resumed", [False, True])
def test_base_is_measured_with_its_own_rope_and_weights(base, windows, resumed):
    model, logged = extended(base), []
    if resumed:
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.3)
    # PEFT would make this one trainable again when it switches the adapter back on.
    next(p for name, p in model.named_parameters() if "lora_A" in name).requires_grad_(False)
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    before = own_losses(model, windows)
    model.train()
    state = type("State", (), {"global_step": 10 if resumed else 0})
    watch = callback(windows, logged, base_config=LlamaConfig.from_pretrained(base))
    watch.on_train_begin(TrainingArguments(use_cpu=True), state, None, model=model)
    losses = own_losses(LlamaForCausalLM.from_pretrained(base), windows)
    expected = losses[ORIGINAL // 2 : ORIGINAL].mean().exp().item()
    assert logged == [{"long_context/base_perplexity_at_original": pytest.approx(expected)}]
    assert [parameter.requires_grad for parameter in model.parameters()] == trainable
    assert model.training
    assert torch.equal(own_losses(model, windows), before)


@pytest.mark.parametrize(
    "kind", ["pissa", "pissa_niter_4", "olora", "orthogonal", "gaussian", False]
)
def test_base_is_right_whatever_the_initialisation(base, windows, kind):
    logged = []
    model = get_peft_model(
        with_linear_rope(base), LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=kind)
    )
    watch = callback(windows, logged, base_config=LlamaConfig.from_pretrained(base))
    watch.on_train_begin(TrainingArguments(use_cpu=True), AtStep(0), None, model=model)
    losses = own_losses(LlamaForCausalLM.from_pretrained(base), windows)
    expected = losses[ORIGINAL // 2 : ORIGINAL].mean().exp().item()
    assert logged == [{"long_context/base_perplexity_at_original": pytest.approx(expected, 1e-3)}]


@pytest.mark.parametrize(
    ("kind", "step", "continues", "reason"),
    [
        ("pissa", 10, False, "has been trained since"),
        ("olora", 0, True, "has been trained since"),
        ("loftq", 0, False, "loftq changes the base weights"),
    ],
)
def test_base_that_cannot_be_had_is_not_shown_and_why(
    base, windows, caplog, kind, step, continues, reason
):
    logged = []
    model = get_peft_model(with_linear_rope(base), LoraConfig(r=4, target_modules=TARGETS))
    model.peft_config["default"].init_lora_weights = kind
    watch = callback(windows, logged, continues_adapter=continues)
    watch.on_train_begin(TrainingArguments(use_cpu=True), AtStep(step), None, model=model)
    assert logged == []
    assert watch.base_perplexity is None
    assert reason in caplog.text


def test_resumed_full_fine_tune_is_not_compared_with_a_base_it_no_longer_has(base, windows):
    logged = []
    state = type("State", (), {"global_step": 10})
    watch = callback(windows, logged)
    model = LlamaForCausalLM.from_pretrained(base)
    watch.on_train_begin(TrainingArguments(use_cpu=True), state, None, model=model)
    assert logged == []
    assert watch.base_perplexity is None


def losing_its_own_context(caplog):
    return [r.getMessage() for r in caplog.records if "above the base model's" in r.getMessage()]


def test_warns_once_when_the_model_falls_behind_the_base(base, windows, tmp_path, caplog):
    watch = callback(windows, [], every_steps=1)
    train(extended(base), tmp_path, [watch], steps=4, learning_rate=3.0)
    (warning,) = losing_its_own_context(caplog)
    assert f"perplexity at {ORIGINAL} tokens" in warning


def test_does_not_warn_while_the_model_keeps_up(base, windows, tmp_path, caplog):
    watch = callback(windows, [], every_steps=1)
    train(extended(base), tmp_path, [watch], steps=3, learning_rate=1e-5)
    assert losing_its_own_context(caplog) == []


def test_evaluation_mode_gives_each_module_its_mode_back():
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Sequential(torch.nn.Dropout()))
    model[1].eval()
    with evaluation_mode(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == [True, True, False, False]


def test_own_rope_is_put_back_after_an_error(base):
    model = extended(base)
    rotary = model.get_base_model().model.rotary_emb
    seen = []

    def fail_inside():
        with own_rope(model, LlamaConfig.from_pretrained(base)):
            seen.append(model.get_base_model().model.rotary_emb.config.rope_parameters)
            raise InterruptedError

    with pytest.raises(InterruptedError):
        fail_inside()
    assert seen[0]["rope_type"] == "default"
    assert model.get_base_model().model.rotary_emb is rotary


def test_held_out_windows_spread_over_documents_without_crossing():
    documents = [np.full(tokens, i) for i, tokens in enumerate([25, 9, 31])]
    rows = held_out_windows(documents, 10, 100)
    assert rows.tolist() == [[0] * 10] * 2 + [[2] * 10] * 3
    some = held_out_windows([np.arange(1000)], 10, 4, seed=1)
    assert some.shape == (4, 10)
    assert math.isclose(float((some[:, 1:] - some[:, :-1]).double().mean()), 1)
    with pytest.raises(ValueError, match="no held-out document has 50 tokens, the longest has 31"):
        held_out_windows(documents, 50, 1)

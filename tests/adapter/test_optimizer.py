"""A tensor of the adapter that the optimizer does not move stops the run before its first step."""

from __future__ import annotations

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model

from longlora_plugin.adapter.callback import CheckOptimizer


@pytest.fixture
def model():
    lora = LoraConfig(target_modules=["q_proj"], modules_to_save=["norm", "embed_tokens"])
    return get_peft_model(tiny.llama(1), lora)


def begin(model, parameters):
    check = CheckOptimizer("mine", RuntimeError)
    check.on_train_begin(
        None, None, None, model=model, optimizer=torch.optim.SGD(list(parameters), lr=1.0)
    )


def test_an_optimizer_that_has_every_tensor_may_start(model):
    begin(model, (p for p in model.parameters() if p.requires_grad))


def test_tensors_that_the_optimizer_leaves_out_are_named(model):
    with pytest.raises(RuntimeError, match=r"mine leaves out 3 tensors.*norm\.modules_to_save"):
        begin(model, (p for p in model.parameters() if p.requires_grad and p.ndim > 1))


def test_tensors_that_were_frozen_later_are_named(model):
    parameters = [p for p in model.parameters() if p.requires_grad]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("embed_tokens" in name and "modules_to_save" in name)
    with pytest.raises(RuntimeError, match="leaves out 5 tensors"):
        begin(model, parameters)

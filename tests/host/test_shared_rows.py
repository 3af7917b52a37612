"""Axolotl 0.19's loss of a row in shards: the mean over the row's targets, whoever holds them.

Axolotl's own hook is played by one that cuts a batch for each rank in turn.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from longlora_plugin.host.compat import RecipeError
from longlora_plugin.host.context_parallel import check_padding, weigh_targets

PROCESSES, TOKENS = 4, 16


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=31, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    return LlamaForCausalLM(config).double()


def cut_by(model: torch.nn.Module, rank: list[int]) -> None:
    """What Axolotl's pre-hook does, but for attention: one token of one document each."""

    def cut(module, args, kwargs):
        n = TOKENS // PROCESSES
        mine = slice(rank[0] * n, (rank[0] + 1) * n)
        return args, {
            name: x[:, mine].contiguous() if isinstance(x, torch.Tensor) and x.dim() == 2 else x
            for name, x in kwargs.items()
        }

    model.register_forward_pre_hook(cut, with_kwargs=True)


@pytest.mark.parametrize("accumulates", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_shards_average_to_the_loss_of_the_whole_row(model, training, accumulates):
    ids = torch.randint(31, (2, TOKENS), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, :9] = -100  # a prompt, of two shards and a bit
    labels[1, 14:] = -100
    batch = {"input_ids": ids, "labels": labels, "position_ids": torch.zeros_like(ids)}
    model.train(training)
    # Every token a document of its own, so that what is cut away is not missed.
    targets = labels[:, 1:]
    logits = torch.stack([model(ids[:, i : i + 1]).logits[:, 0] for i in range(TOKENS)], 1)
    wanted = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), targets.flatten(), ignore_index=-100
    )
    expected = torch.autograd.grad(wanted, list(model.parameters()))
    items = {"num_items_in_batch": (targets != -100).sum()} if accumulates else {}

    rank = [0]
    cut_by(model, rank)
    hooks = len(model._forward_pre_hooks)
    undo = weigh_targets(model, PROCESSES)
    losses = []
    for rank[0] in range(PROCESSES):
        losses.append(_alone(model, batch, items))
    if training:
        # Without a count of its own, the trainer's processes are averaged; with one it multiplies.
        total = torch.stack(losses).sum() if accumulates else torch.stack(losses).mean()
        assert float((total - wanted).abs()) < 1e-6
        found = torch.autograd.grad(total, list(model.parameters()))
        for ours, theirs in zip(found, expected, strict=True):
            assert float((ours - theirs).abs().max()) < 1e-6
    else:
        # Axolotl weighs the means of an evaluation by the labels that it sees after cutting.
        counts = torch.tensor([(targets_of(labels, r) != -100).sum() for r in range(PROCESSES)])
        mean = (
            sum(loss * count for loss, count in zip(losses, counts, strict=True) if count)
            / counts.sum()
        )
        assert float((mean - wanted).abs()) < 1e-6
    undo()
    assert len(model._forward_pre_hooks) == hooks


def targets_of(labels: torch.Tensor, rank: int) -> torch.Tensor:
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)[:, rank * 4 : rank * 4 + 4]


def _alone(model, batch, items) -> torch.Tensor:
    """The loss with attention of each token to itself alone."""
    mask = torch.eye(TOKENS // PROCESSES, dtype=torch.bool)[None, None]
    return model(**batch, **items, attention_mask=mask.expand(2, -1, -1, -1)).loss


def test_a_model_whose_loss_cannot_be_told_is_refused(model):
    class Plain(torch.nn.Module):
        def forward(self, input_ids, labels=None):
            return None

    with pytest.raises(RecipeError, match="Plain: its loss cannot be told"):
        weigh_targets(Plain(), 2)


def test_rows_padded_on_the_left_are_refused():
    left = SimpleNamespace(padding_side="left")
    with pytest.raises(RecipeError, match=r"pads on the left.*sample_packing: true"):
        check_padding(left, packed=False)
    check_padding(left, packed=True)
    check_padding(SimpleNamespace(padding_side="right"), packed=False)


def test_a_launch_with_deepspeed_that_the_recipe_does_not_name_is_refused(monkeypatch):
    from longlora_plugin.plugin import LongLoRAPlugin

    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(RecipeError, match="write deepspeed: and its file into the recipe"):
        LongLoRAPlugin()._share_rows(
            SimpleNamespace(deepspeed=None, get=lambda _: None), None, None
        )

"""Tasks for `processes.py`: tiny models over several processes against one."""

from __future__ import annotations

import threading
from typing import Any

import tiny
import torch
import torch.distributed as dist
from sharded_rows import Traffic, counted
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from longlora_plugin.attention import enable_shifted_attention

VOCABULARY = 97


def llama(**changes: Any) -> Any:
    return tiny.llama(weights=3.0, **changes).double()


def positions_of(documents: tuple[int, ...]) -> torch.Tensor:
    return torch.cat([torch.arange(length) for length in documents])[None]


def loss_of(model: Any, ids: torch.Tensor, given: dict[str, Any], cut: slice) -> torch.Tensor:
    """Sum of a shard's token losses, the targets being shifted on the whole row."""
    targets = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -100)], dim=1)[:, cut]
    logits = model(input_ids=ids[:, cut], **{name: x[:, cut] for name, x in given.items()}).logits
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), reduction="sum", ignore_index=-100
    )


def train(
    group: dist.ProcessGroup,
    lengths: tuple[int, ...],
    passes: list[tuple[int, ...]],
    options: dict[str, Any],
) -> tuple[float, Traffic]:
    """One step of several passes, all forward before one backward, against one process.

    Args:
        lengths: tokens of each process.
        passes: lengths of the documents of each pass's row.
        options: group_size, and for the model `implementation`, `checkpointing` (None or
            use_reentrant), `padded` tokens at the end, `thread`: backward runs in another one.

    Returns:
        The largest difference of a parameter's gradient, and what collectives moved.
    """
    rank = dist.get_rank(group)
    cut = slice(sum(lengths[:rank]), sum(lengths[: rank + 1]))
    draw = torch.Generator().manual_seed(1)
    batches = []
    for documents in passes:
        ids = torch.randint(VOCABULARY, (1, sum(lengths)), generator=draw)
        given = {"position_ids": positions_of(documents)}
        if options.get("padded"):
            mask = torch.ones_like(ids)
            mask[:, -options["padded"] :] = 0
            given["attention_mask"] = mask
        batches.append((ids, given))

    def gradients(cut: slice, **sharing: Any) -> tuple[list[torch.Tensor], Traffic]:
        model = llama(attn_implementation=options.get("implementation", "sdpa"))
        handle = enable_shifted_attention(model, group_size=options["group_size"], **sharing)
        if options.get("checkpointing") is not None:
            model.gradient_checkpointing_enable({"use_reentrant": options["checkpointing"]})
            model.enable_input_require_grads()
        with counted() as traffic:
            loss = sum(loss_of(model, ids, given, cut) for ids, given in batches)
            traffic.received_forward = traffic.received
            if options.get("thread"):
                thread = threading.Thread(target=loss.backward)
                thread.start()
                thread.join()
            else:
                loss.backward()
        assert handle.calls >= 2 * len(batches)
        handle.remove()
        return [parameter.grad for parameter in model.parameters()], traffic

    wanted, alone = gradients(slice(None))
    assert alone == Traffic()
    found, traffic = gradients(cut, process_group=group)
    worst = 0.0
    for gradient, expected in zip(found, wanted, strict=True):
        dist.all_reduce(gradient, group=group)
        worst = max(worst, ((gradient - expected).abs().max() / expected.abs().max()).item())
    return worst, traffic


def alone(group: dist.ProcessGroup) -> bool:
    """A group of one: equal to none at all bit for bit, without a collective."""
    ids = torch.randint(VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(1))
    results = []
    for sharing in ({}, {"process_group": group}):
        model = llama()
        handle = enable_shifted_attention(model, group_size=8, **sharing)
        with counted() as traffic:
            logits = model(ids).logits
            logits.sum().backward()
        assert traffic == Traffic()
        handle.remove()
        results.append([logits.detach(), *(p.grad for p in model.parameters())])
    return all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def refuse(group: dist.ProcessGroup, given: list[dict[str, Any]], **options: Any) -> str:
    """The error of a pass in which each process is given its own arguments; then a good one."""
    model = llama(**options)
    handle = enable_shifted_attention(model, group_size=8, process_group=group)
    rank = dist.get_rank(group)
    try:
        model(**given[rank])
        said = "nothing"
    except ValueError as error:
        said = str(error)
    positions = torch.arange(10 * rank, 10 * rank + 10)[None]
    model(input_ids=torch.ones_like(positions), position_ids=positions).logits.sum().backward()
    handle.remove()
    return said


def enable_and_remove(group: dist.ProcessGroup) -> tuple[Any, Any]:
    """What is registered and hooked before a run with a group, and after `remove()`."""
    model = llama()
    positions = torch.arange(10)[None] + 10 * dist.get_rank(group)

    def state() -> Any:
        hooks = [
            (len(m._forward_hooks), len(m._forward_pre_hooks), sorted(m.__dict__))
            for m in model.modules()
        ]
        masks = {name: id(function) for name, function in ALL_MASK_ATTENTION_FUNCTIONS.items()}
        return hooks, masks, sorted(vars(ALL_ATTENTION_FUNCTIONS))

    before = state()
    logits = model(input_ids=positions, position_ids=positions).logits
    handle = enable_shifted_attention(model, group_size=8, process_group=group)
    model(input_ids=positions, position_ids=positions).logits.sum().backward()
    handle.remove()
    again = model(input_ids=positions, position_ids=positions).logits
    return (before, True), (state(), torch.equal(logits, again))


def refuse_model(group: dist.ProcessGroup, changes: dict[str, Any]) -> str:
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {
        "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0,
        "max_position_embeddings": 64,
    }  # fmt: skip
    kind = changes.pop("model_type")
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**shape, **changes}))
    try:
        enable_shifted_attention(model, group_size=8, process_group=group)
    except ValueError as error:
        return str(error)
    return "nothing"

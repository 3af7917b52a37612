"""What LongLoRA trains in addition to LoRA: input embeddings and norms (section 3.3, Table 2).

LoRA alone does not extend a context; with trainable embeddings and norms it does. The modules are
found on the built model by what they are, not by what a family calls them, and trained as PEFT
`modules_to_save`, so PEFT itself saves, loads and merges them (in fp32: `fp32_weights.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from longlora_plugin.hookspecs import hookimpl

if TYPE_CHECKING:
    import torch


def embedding_modules(model: Any) -> list[str]:
    """Name of the input embedding module."""
    wanted = model.get_input_embeddings()
    return [name for name, module in model.named_modules() if module is wanted]


def norm_modules(model: Any) -> list[str]:
    """Names of every normalisation layer with weights, in a multimodal model the decoder's."""
    decoder = (model.get_decoder() if hasattr(model, "get_decoder") else None) or model
    inside = {id(module) for module in decoder.modules()}
    if id(model.get_input_embeddings()) not in inside:
        # ModernBERT calls its output head the decoder.
        inside = {id(module) for module in model.modules()}
    return [
        name
        for name, module in model.named_modules()
        if id(module) in inside
        and "norm" in type(module).__name__.lower()
        and not any(module.children())
        and any(True for _ in module.parameters())
    ]


MODULE_KINDS: dict[str, Callable[[Any], list[str]]] = {
    "embeddings": embedding_modules,
    "norms": norm_modules,
}


@hookimpl
def longlora_trainable_modules() -> dict[str, Callable[..., list[str]]]:
    """The built-in kinds of modules."""
    return dict(MODULE_KINDS)


def shortest_names(model: torch.nn.Module, names: Iterable[str]) -> list[str]:
    """Names for PEFT that select exactly these modules: `input_layernorm` rather than 32 paths.

    PEFT selects every module whose path ends with a given name. Where a short name would select
    too much, the full paths stay.
    """
    wanted = set(names)
    short = sorted({name.rsplit(".", 1)[-1] for name in wanted})
    selected = {name for name, _ in model.named_modules() if name.endswith(tuple(short))}
    return short if selected == wanted else sorted(wanted)


def embeddings_are_tied(model: Any) -> bool:
    """Whether the output head shares the input embedding's weight."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def has_any_named(model: torch.nn.Module, names: Iterable[str]) -> bool:
    """Whether some module's own name, the last part of its path, is one of `names`."""
    wanted = set(names)
    return any(name.rsplit(".", 1)[-1] in wanted for name, _ in model.named_modules())


def attention_projections(model: torch.nn.Module) -> list[str]:
    """Names of the linear layers of the model's attention, for families without q_proj … o_proj.

    GPT-2's are `Conv1D`, a linear layer whose weight is transposed.
    """
    import torch

    from longlora_plugin.attention.eligibility import attention_layers

    return sorted(
        {
            name
            for attention in attention_layers(model)
            for name, child in attention.named_children()
            if isinstance(child, torch.nn.Linear)
            or type(child).__name__.startswith(("Linear", "Conv1D"))
        }
    )


def untrained_modules(model: Any, names: Iterable[str]) -> list[str]:
    """Those of the base model's modules `names` that its PEFT model does not train in full."""
    from peft.utils import ModulesToSaveWrapper

    trained = {
        name.removeprefix("base_model.model.")
        for name, module in model.named_modules()
        if isinstance(module, ModulesToSaveWrapper)
    }
    return sorted(set(names) - trained)

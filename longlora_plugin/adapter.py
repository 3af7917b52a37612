"""What LongLoRA trains beside LoRA: input embeddings and norms (section 3.3, Table 2).

LoRA alone does not extend a context; with trainable embeddings and norms it does. The modules are
found on the built model by what they are, not by what a family calls them, and trained as PEFT
`modules_to_save`, so stock PEFT saves, loads and merges them.

PEFT keeps such copies in the base model's dtype. In bf16 an update of relative size 2⁻⁹ or less
rounds away, so at the paper's learning rate norms would never move: `keep_fp32_masters` trains
fp32 copies while activations stay in the compute dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch.nn import functional


def embedding_modules(model: Any) -> list[str]:
    """Name of the input embedding module."""
    wanted = model.get_input_embeddings()
    return [name for name, module in model.named_modules() if module is wanted]


def norm_modules(model: Any) -> list[str]:
    """Names of every normalisation layer with weights, in a multimodal model the decoder's."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    inside = {id(module) for module in (decoder or model).modules()}
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


def attention_projections(model: torch.nn.Module) -> list[str]:
    """Names of the linear layers of the model's attention, for families without q_proj … o_proj."""
    from longlora_plugin.attention.eligibility import attention_layers

    return sorted(
        {
            name
            for attention in attention_layers(model)
            for name, child in attention.named_children()
            if isinstance(child, torch.nn.Linear) or type(child).__name__.startswith("Linear")
        }
    )


def untrained_modules(model: Any, names: Iterable[str]) -> list[str]:
    """Those of the base model's modules `names` that its PEFT model does not train in full."""
    trained = {
        name.removeprefix("base_model.model.")
        for name, module in model.named_modules()
        if isinstance(module, ModulesToSaveWrapper)
    }
    return sorted(set(names) - trained)


@dataclass(frozen=True)
class TrainedModules:
    """What is trained beside LoRA.

    Attributes:
        modules: number of trained copies.
        parameters: number of their parameters.
        dtype: dtype of the trained weights.
        compute_dtype: dtype of the activations they produce.
    """

    modules: int
    parameters: int
    dtype: torch.dtype | None
    compute_dtype: torch.dtype | None


def keep_fp32_masters(model: torch.nn.Module) -> TrainedModules:
    """Train the `modules_to_save` copies of a PEFT model in fp32, computing as before.

    Embedding and norm outputs are cast back to the dtype the copies had, a tied output head casts
    its weight instead, so activations, and what flash kernels are given, keep their dtype.

    Returns:
        What is trained, for the log.
    """
    copies = {
        id(copy): copy
        for wrapper in model.modules()
        if isinstance(wrapper, ModulesToSaveWrapper)
        for copy in wrapper.modules_to_save.values()
    }
    parameters = {id(p): p for copy in copies.values() for p in copy.parameters()}
    # Read first: a tied output head shares its embedding's parameter, which is cast only once.
    compute = {key: next(copy.parameters()).dtype for key, copy in copies.items()}
    for key, copy in copies.items():
        if compute[key] in (torch.bfloat16, torch.float16):
            copy.float()
            _compute_in(copy, compute[key])
    some = next(iter(copies), None)
    return TrainedModules(
        modules=len(copies),
        # ZeRO-3 leaves a process a part of each parameter; its `ds_numel` is the whole.
        parameters=sum(getattr(p, "ds_numel", p.numel()) for p in parameters.values()),
        dtype=None if some is None else next(copies[some].parameters()).dtype,
        compute_dtype=None if some is None else compute[some],
    )


def _compute_in(module: torch.nn.Module, dtype: torch.dtype) -> None:
    if isinstance(module, torch.nn.Linear):

        def linear(x: torch.Tensor) -> torch.Tensor:
            bias = None if module.bias is None else module.bias.to(x.dtype)
            return functional.linear(x, module.weight.to(x.dtype), bias)

        module.forward = linear
        return
    if not isinstance(module, torch.nn.Embedding):
        module.register_forward_pre_hook(_input_in_the_weights_dtype)
    module.register_forward_hook(lambda _module, _args, output: output.to(dtype))


def _input_in_the_weights_dtype(module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    # Some kernels (LayerNorm on CUDA) want input and weight alike. Not always fp32: DeepSpeed
    # casts the module and keeps masters of its own.
    return (args[0].to(next(module.parameters()).dtype), *args[1:])

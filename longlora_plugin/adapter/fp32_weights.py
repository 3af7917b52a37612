"""Why embeddings and norms are trained as fp32 copies, and how.

PEFT keeps `modules_to_save` copies in the base model's dtype. In bf16 an update of relative size
2⁻⁹ or less rounds away, so at the paper's learning rate norms would never move:
`train_in_fp32` trains fp32 copies while activations stay in the compute dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch.nn import functional


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


def train_in_fp32(model: torch.nn.Module) -> TrainedModules:
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

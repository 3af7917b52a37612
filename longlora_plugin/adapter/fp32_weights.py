"""Why embeddings and norms are trained as fp32 copies, and how.

PEFT keeps `modules_to_save` copies in the base model's dtype. In bf16 an update of relative size
2⁻⁹ or less rounds away, so at the paper's learning rate norms would never move:
`train_in_fp32` trains fp32 copies while the model computes in the dtype it had.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch.nn import functional

from longlora_plugin.adapter.modules import untrained_modules
from longlora_plugin.adapter.state import load_adapter_state, read_adapter_state, some


@dataclass(frozen=True)
class TrainedModules:
    """What is trained in addition to LoRA.

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


def prepare_adapter(
    model: Any,
    names: Iterable[str],
    *,
    start_from: str | Path | None,
    reason: str,
    rounded: bool = False,
) -> TrainedModules:
    """Train the modules `names` in fp32, from the values that an earlier adapter has.

    Args:
        model: the PEFT model.
        names: of the base model's modules that train in addition to LoRA.
        start_from: folder or name of the adapter that the run continues from, where PEFT loaded
            it: into copies in the base model's dtype, which rounds them.
        reason: why a module of `names` may not train.
        rounded: whether TRL attached the adapter, and rounded it to bf16.

    Raises:
        ValueError: some would not train, or the earlier adapter does not fit.
    """
    untrained = untrained_modules(model, names)
    if untrained:
        raise ValueError(
            f"longlora: {{trainable: …}} asks for {len(untrained)} modules that would not "
            f"train ({some(untrained)}): {reason}. Write "
            "longlora: {trainable: []}, or start without it"
        )
    if rounded:
        undo_rounding(model)
    trained = train_in_fp32(model)
    if start_from:
        try:
            load_adapter_state(model, read_adapter_state(start_from))
        except ValueError as error:
            raise ValueError(f"lora_model_dir: {start_from}: {error}") from error
    return trained


def train_in_fp32(model: torch.nn.Module) -> TrainedModules:
    """Train the `modules_to_save` copies of a PEFT model in fp32, computing as before.

    Norms and a tied output head read their weights in the dtype that the copies had, embeddings
    cast what they look up: activations keep their dtype, and fused norms are given one dtype.

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


def undo_rounding(model: torch.nn.Module) -> None:
    """Give freshly attached weights on a quantized base the dtypes that PEFT gives them.

    TRL rounds everything that trains there to bf16: LoRA, which PEFT keeps in fp32, and the copies
    of modules, which then differ from the base's own that a reference pass uses.
    """
    for wrapper in model.modules():
        if not isinstance(wrapper, ModulesToSaveWrapper):
            continue
        for copy in wrapper.modules_to_save.values():
            for parameter, own in zip(
                copy.parameters(), wrapper.original_module.parameters(), strict=True
            ):
                parameter.data = own.detach().clone()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_" in name:
            parameter.data = parameter.data.float()


def _compute_in(module: torch.nn.Module, dtype: torch.dtype) -> None:
    if isinstance(module, torch.nn.Linear):

        def linear(x: torch.Tensor) -> torch.Tensor:
            bias = None if module.bias is None else module.bias.to(x.dtype)
            return functional.linear(x, module.weight.to(x.dtype), bias)

        module.forward = linear
        return
    if not isinstance(module, torch.nn.Embedding):
        _read_in(module, dtype)
    module.register_forward_hook(lambda _module, _args, output: output.to(dtype))


def _read_in(module: torch.nn.Module, dtype: torch.dtype) -> None:
    """Have the module's forward pass, whatever norm it is, read its fp32 parameters in `dtype`.

    Elsewhere `module.weight` is the parameter itself: FSDP2 looks it up by name.
    """
    own = type(module)
    bound = module.__dict__.pop("forward", None)  # as Liger binds its own to one module

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.reads_cast = True
        try:
            return bound(*args, **kwargs) if bound else own.forward(self, *args, **kwargs)
        finally:
            self.reads_cast = False

    reads = {name: _ReadIn(name, dtype) for name, _ in module.named_parameters(recurse=False)}
    body = {"__module__": own.__module__, "reads_cast": False, "forward": forward, **reads}
    module.__class__ = type(own.__name__, (own,), body)


class _ReadIn:
    """An attribute that gives a parameter, in another dtype while `reads_cast`.

    Without `__set__`, so that FSDP1's plain tensors, which are set on the module, come first.
    """

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self.name = name
        self.dtype = dtype

    def __get__(self, module: Any, owner: type) -> Any:
        if module is None:
            return self
        parameter = module._parameters[self.name]
        return parameter.to(self.dtype) if module.reads_cast else parameter

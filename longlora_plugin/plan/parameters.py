"""Which parameters a run trains, counted on a model without weights.

LoRA adds r · (in + out) elements to each module it targets; a module trained as a whole
(embeddings, norms, `lora_modules_to_save`) is a second copy, as PEFT's `modules_to_save` makes it:
the frozen original stays.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Parameters:
    """Parameter counts of a run.

    Attributes:
        base: of the base model, tied weights once.
        lora: of the LoRA matrices.
        copies: of the modules trained as a whole in addition to LoRA.
        trained_base: parameters of the base model itself that are trained (full fine-tune).
        quantizable: elements of the matrices that bitsandbytes quantizes: every linear layer
            except the output head.
        quantizable_rows: output rows of those matrices.
        largest_matrix: elements of the largest of them.
        largest_unit: parameters of the largest decoder layer or embedding: what ZeRO-3 and FSDP
            gather at once.
        outside_layers: parameters that belong to no decoder layer (embeddings, head).
    """

    base: int
    lora: int
    copies: int
    trained_base: int
    quantizable: int
    quantizable_rows: int
    largest_matrix: int
    largest_unit: int
    outside_layers: int

    @property
    def trained(self) -> int:
        return self.lora + self.copies + self.trained_base

    @property
    def frozen(self) -> int:
        return self.base - self.trained_base


def _numel(modules: Iterable[Any]) -> int:
    return sum({id(p): p.numel() for module in modules for p in module.parameters()}.values())


def _is_target(name: str, targets: Sequence[str] | str) -> bool:
    # PEFT's rule, without importing PEFT for it (two seconds).
    if isinstance(targets, str):
        try:
            return re.fullmatch(targets, name) is not None
        except re.error as error:
            raise ValueError(
                f"lora_target_modules: {targets!r} is no regular expression: {error}"
            ) from None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def is_kind(module: Any, *names: str) -> bool:
    """Whether a module is of a class of one of these names: asked by name, without torch."""
    return any(kind.__name__ in names for kind in type(module).__mro__)


def _linear_layers(model: Any) -> dict[str, Any]:
    """Every linear layer but the output head, by its name. Conv1D is one, transposed."""
    head = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if is_kind(module, "Linear", "Conv1D") and module is not head
    }


def _targets(model: Any, target_modules: Sequence[str] | str) -> list[Any]:
    if target_modules == "all-linear":
        return list(_linear_layers(model).values())
    return [
        module
        for name, module in model.named_modules()
        if is_kind(module, "Linear", "Embedding", "Conv1D") and _is_target(name, target_modules)
    ]


def count_parameters(
    model: Any,
    *,
    lora_r: int | None = None,
    target_modules: Sequence[str] | str = (),
    target_parameters: Sequence[str] = (),
    dora: bool = False,
    saved_modules: Sequence[str] = (),
    unfrozen: Sequence[str] = (),
) -> Parameters:
    """Count what a run trains.

    Args:
        model: a causal language model, weights or none.
        lora_r: LoRA's rank; None for a full fine-tune.
        target_modules: LoRA's targets as PEFT takes them: names, a regular expression, or
            `all-linear`.
        target_parameters: parameters (fused experts) that LoRA targets by name.
        dora: one magnitude more for each output of a target.
        saved_modules: names of modules trained as a whole in addition to LoRA, in full or from
            the end.
        unfrozen: regular expressions of the only parameters a full fine-tune trains; all if empty.

    Raises:
        ValueError: LoRA's targets match nothing in this model.
    """
    base = {name: p.numel() for name, p in model.named_parameters()}
    linear = _linear_layers(model).values()
    layers = _decoder_layers(model)
    largest_layer = max((_numel([layer]) for layer in layers), default=0)
    lora = copies = trained_base = 0
    if lora_r is None:
        trained_base = sum(
            count
            for name, count in base.items()
            if not unfrozen or any(re.match(pattern.split("[")[0], name) for pattern in unfrozen)
        )
    else:
        lora = _lora_elements(model, lora_r, target_modules, target_parameters, dora)
        copies = _numel(m for name, m in model.named_modules() if _is_target(name, saved_modules))
    return Parameters(
        base=sum(base.values()),
        lora=lora,
        copies=copies,
        trained_base=trained_base,
        quantizable=sum(m.weight.numel() for m in linear),
        quantizable_rows=sum(m.weight.shape[0] for m in linear),
        largest_matrix=max((m.weight.numel() for m in linear), default=0),
        largest_unit=max(largest_layer, model.get_output_embeddings().weight.numel()),
        outside_layers=sum(base.values()) - _numel(layers),
    )


def _lora_elements(
    model: Any,
    lora_r: int,
    target_modules: Sequence[str] | str,
    target_parameters: Sequence[str],
    dora: bool,
) -> int:
    targets = _targets(model, target_modules)
    fused = [p for name, p in model.named_parameters() if _is_target(name, target_parameters)]
    if not targets and not fused:
        names = sorted({name.rsplit(".", 1)[-1] for name in _linear_layers(model)})
        raise ValueError(
            f"lora_target_modules: {target_modules!r} match no module of this model; "
            f"its linear layers are called {', '.join(names)}"
        )
    lora = 0
    for module in targets:
        rows, columns = module.weight.shape
        lora += lora_r * (rows + columns) + (rows if dora else 0)
    for parameter in fused:
        *experts, rows, columns = parameter.shape
        lora += lora_r * (rows + columns) * (experts[0] if experts else 1)
    return lora


def _decoder_layers(model: Any) -> list[Any]:
    depth = model.config.get_text_config().num_hidden_layers
    for module in model.get_decoder().modules():
        if is_kind(module, "ModuleList") and len(module) == depth:
            return list(module)
    return []

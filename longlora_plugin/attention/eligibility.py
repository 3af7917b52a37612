"""Which attention layers S²-Attn may cover: causal, full attention, through the registry.

Judged on the built model by what a layer is and does, never by its family. Every layer that is not
covered is counted with the reason.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Mapping

import torch

from longlora_plugin.attention.layout import LOCAL_FREQUENCIES
from longlora_plugin.attention.vocabulary import FULL_ATTENTION, limits_attention

REGISTRY_NAME = "ALL_ATTENTION_FUNCTIONS"
"""transformers' registry of attention functions, as modelling files call it."""


def eligible_layers(model: torch.nn.Module) -> tuple[list[torch.nn.Module], Counter[str]]:
    """Attention modules that S² may cover, and the reasons why others are not, counted.

    Layers without attention (linear attention, convolutions) are counted too, where the config
    lists them in `layer_types`.
    """
    covered: list[torch.nn.Module] = []
    skipped: Counter[str] = Counter()
    layers = attention_layers(model)
    for module in layers:
        reason = _why_not(module)
        if reason:
            skipped[reason] += 1
        else:
            covered.append(module)
    # By the list itself: some families give their layers copies of the config.
    attending = {(_layer_types(layer), getattr(layer, "layer_idx", None)) for layer in layers}
    for layer_types in {_layer_types(module) for module in model.modules()}:
        for index, kind in enumerate(layer_types):
            if kind not in FULL_ATTENTION and (layer_types, index) not in attending:
                skipped[f"{_words(kind)} layer has no attention that could be shifted"] += 1
    return covered, skipped


def attention_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """All attention modules of a transformers model, of whatever kind."""
    return [
        module
        for module in model.modules()
        if hasattr(module, "config")
        and (
            hasattr(module, "is_causal")
            or (hasattr(module, "layer_idx") and type(module).__name__.endswith("Attention"))
        )
    ]


def told(skipped: Mapping[str, int]) -> str:
    """Reason → layers, in words."""
    return "; ".join(f"{count} × {reason}" for reason, count in skipped.items())


def check_shardable(model: torch.nn.Module, skipped: Mapping[str, int]) -> None:
    """Raise ValueError where a part of the model would take a shard for the whole row.

    Args:
        skipped: reason → layers that shifted attention does not cover.
    """
    if skipped:
        raise ValueError(
            f"rows that processes share: {type(model).__name__} has layers that shifted attention "
            f"does not cover and that would see their own shard only: {told(skipped)}. Train it "
            "without context_parallel_size (or process_group)"
        )
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        for kind in kinds.values() if isinstance(kinds, Mapping) else [kinds]:
            if kind in LOCAL_FREQUENCIES:
                raise ValueError(
                    f"rows that processes share: RoPE of type {kind} takes its frequencies from "
                    "the longest position in the model, and each shard has another; write linear, "
                    "ntk, yarn or llama3"
                )


def _words(kind: str) -> str:
    return kind.replace("_", " ")


def _why_not(module: torch.nn.Module) -> str | None:
    name, config = type(module).__name__, module.config
    code = inspect.unwrap(type(module).forward).__code__
    if REGISTRY_NAME not in code.co_names:
        return f"{name} does not go through transformers' attention interface"
    if any(isinstance(const, tuple) and "position_bias" in const for const in code.co_consts):
        return f"{name} adds a position bias to its scores"
    if getattr(module, "is_causal", None) is not True:
        return f"{name} is not causal"
    if getattr(module, "is_cross_attention", False):
        return f"{name} is cross-attention"
    window = getattr(module, "sliding_window", None)
    kind = _layer_kind(module)
    if kind in FULL_ATTENTION:
        return None
    if kind is None or "sliding" in kind:
        window = window or getattr(config, "sliding_window", None)
        if limits_attention(window, config):
            return f"{name} has a sliding window of {window} tokens"
        return None
    return f"{name} is {_words(kind)}"


def _layer_types(module: torch.nn.Module) -> tuple[str, ...]:
    return tuple(getattr(getattr(module, "config", None), "layer_types", None) or ())


def _layer_kind(module: torch.nn.Module) -> str | None:
    layer_types = _layer_types(module)
    index = getattr(module, "layer_idx", None)
    # A block that several layers share has no index of its own (Zamba2: -1).
    if not layer_types or index is None or not 0 <= index < len(layer_types):
        return None
    return layer_types[index]

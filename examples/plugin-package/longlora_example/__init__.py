"""One of each thing that a package can add to LongLoRA.

The hooks are called whenever a name is looked up, so what is heavy is imported inside them: this
module itself loads no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longlora_plugin.hookspecs import hookimpl

if TYPE_CHECKING:
    from longlora_plugin.attention import AttentionPattern
    from longlora_plugin.rope import RopeRequest

__all__ = [
    "longlora_attention_patterns",
    "longlora_recipes",
    "longlora_rope_presets",
    "longlora_trainable_modules",
]


@hookimpl
def longlora_rope_presets() -> dict[str, Callable[[RopeRequest], dict[str, Any]]]:
    return {"exact": exact_interpolation}


def exact_interpolation(request: RopeRequest) -> dict[str, Any]:
    """Position interpolation by target / original itself, which `linear` rounds up."""
    unknown = sorted(request.options)
    if unknown:
        raise ValueError(f"rope: exact takes no options, got {', '.join(unknown)}")
    if request.rope_type != "default":
        raise ValueError(f"rope: exact needs an unscaled base, this one has {request.rope_type}")
    return {"rope_type": "linear", "factor": request.target_context / request.pretrained_context}


@hookimpl
def longlora_attention_patterns() -> dict[str, AttentionPattern]:
    from longlora_plugin.attention import AttentionPattern

    # Groups without shift: the paper's Table 1 shows why the shift is needed.
    return {"groups": AttentionPattern("groups", lambda heads, group_size: [0] * heads)}


@hookimpl
def longlora_trainable_modules() -> dict[str, Callable[[Any], list[str]]]:
    return {"head": output_head}


def output_head(model: Any) -> list[str]:
    """The output head, unless it is the input embedding, which `embeddings` trains already."""
    head = model.get_output_embeddings()
    if head is None or head.weight is model.get_input_embeddings().weight:
        return []
    return [name for name, module in model.named_modules() if module is head]


@hookimpl
def longlora_recipes() -> dict[str, Path]:
    folder = Path(__file__).parent / "recipes"
    return {path.stem: path for path in folder.glob("*.yml")}

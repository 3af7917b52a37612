"""Every hook of LongLoRA. A package adds to it by declaring an entry point in group `longlora`.

Each hook returns a mapping from a name, as recipes will write it, to what it names.
The built-ins come through the same hooks (`registry.BUILTINS`). A hook is called whenever its names
are needed, so import what is heavy inside it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from longlora_plugin.attention.layout import AttentionPattern

hookspec = pluggy.HookspecMarker("longlora")
hookimpl = pluggy.HookimplMarker("longlora")


@hookspec
def longlora_rope_presets() -> dict[str, Callable[..., Any]]:  # type: ignore[empty-body]
    """RoPE presets, for `longlora.rope`.

    Name → function of a `longlora_plugin.rope.RopeRequest` that returns the new `rope_parameters`
    as plain JSON values: `rope_type` at least; θ and partial rotary are the base model's unless it
    says otherwise. It raises ValueError for an option it does not know (`request.options`). It is
    called only where the target is above what the base supports, or where options are given.
    """


@hookspec
def longlora_attention_patterns() -> dict[str, AttentionPattern]:  # type: ignore[empty-body]
    """Attention patterns, for `longlora.attention_pattern`.

    Name → `longlora_plugin.attention.AttentionPattern(name, shifts)`. `shifts` is a function of
    (heads, group_size) that returns one shift a head, from 0 to group_size − 1: a token i of that
    head attends inside segment ⌊(i + shift) / group_size⌋ of its document. Every back end, packing
    and padding then work by themselves, and nothing can see a later token. With
    `skips_positions=True`, all shifts are 0 and the positions of each segment leave out a random
    stretch (PoSE).
    """


@hookspec
def longlora_trainable_modules() -> dict[str, Callable[..., list[str]]]:  # type: ignore[empty-body]
    """Kinds of modules that train in addition to LoRA, for `longlora.trainable`.

    Kind → function of the base model that returns names of its modules, as `named_modules()` gives
    them. They are trained in full, with fp32 masters, and saved as PEFT `modules_to_save`. `plan`
    calls it with a model without weights (meta tensors), so it must not read any.
    """


@hookspec
def longlora_recipes() -> dict[str, Path]:  # type: ignore[empty-body]
    """Recipes, for `longlora recipes`.

    Name → path of a YAML file that exists. `recipes list` shows the first sentence of its leading
    comment.
    """

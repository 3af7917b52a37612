"""FLOPs of a forward pass and of a training step, by part (LongLoRA, Table 11).

A multiplication and an addition are two FLOPs. Two counts, never mixed:

*Dense*, the paper's: every query meets every key of its group, causal or not. With N tokens,
width d, L layers, FFN width f and vocabulary V (multi-head, gated FFN) a forward pass takes

    attention    4 N² d L; S² with group size G: 4 N G d L
    projections  8 N d² L
    FFN          6 N d f L, and 2 N f L for the activation and the gate
    others       2 N d V (output head), 4 N d (2 L + 1) (norms: square, mean, scale, weight),
                 6 N d L (RoPE: two products and a sum for each query and key element),
                 2 N d L (residual sums)

Softmax and the attention scale are not counted. This reproduces each part of Table 11 to the
printed digit. The paper's totals are sums of the printed parts: at 16384 they give 357.2 where the
unrounded sum is 357.284.

*Causal*, what a kernel has to do: only the pairs of query and key that exist. Full attention has
N (N + 1) / 2 of them; S² has Σ n (n + 1) / 2 over the segments of each head, which is less than a
quarter of that at G = N/4 because the shifted heads' end segments are half as long (Variant 2).
FlashAttention skips the masked blocks, so this is the count that predicts time.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from longlora_plugin.attention.layout import S2, AttentionPattern, ends, head_runs
from longlora_plugin.plan.shape import ModelShape

TERA = 1e12
FLASH_BACKWARD = 2.5
"""Backward over forward of a FlashAttention kernel: five products of that size for two, since it
computes the scores again. With the scores kept (eager attention) it is 2."""


@dataclass(frozen=True)
class Flops:
    """FLOPs by part."""

    attention: float
    projections: float
    ffn: float
    others: float

    @property
    def total(self) -> float:
        return self.attention + self.projections + self.ffn + self.others

    def tera(self) -> dict[str, float]:
        """The parts and their total, in TFLOPs."""
        parts = {name: value / TERA for name, value in vars(self).items()}
        return {**parts, "total": self.total / TERA}


@dataclass(frozen=True)
class StepKind:
    """How a training step computes.

    Attributes:
        trains_base: the model's own matrices are trained (full fine-tune).
        lora_weights: elements of the LoRA matrices; counted with the projections.
        checkpointing: layers are computed again in the backward pass.
        flash: attention recomputes its scores in the backward pass.
        tiled_mlp: the FFN runs forward once more in its backward pass, tile by tile.
    """

    trains_base: bool = False
    lora_weights: int = 0
    checkpointing: bool = True
    flash: bool = True
    tiled_mlp: bool = False


USUAL_STEP = StepKind()


def _pairs_in_row(length: int) -> int:
    return length * (length + 1) // 2


def attended_pairs(
    shape: ModelShape,
    length: int,
    window: int | None,
    group_size: int | None,
    *,
    causal: bool,
    pattern: AttentionPattern = S2,
) -> int:
    """Pairs of query and key of one layer and one document, summed over its query heads.

    Args:
        length: tokens of the document.
        window: sliding window of the layer; S² leaves such a layer alone.
        group_size: tokens in a group of S²; None for the model's own attention.
    """
    if window is not None and window < length:
        if not causal:
            return shape.heads * length * window
        return shape.heads * (_pairs_in_row(window) + (length - window) * window)
    if group_size is None or window is not None:
        return shape.heads * (_pairs_in_row(length) if causal else length * length)
    if not causal:
        return shape.heads * length * min(group_size, length)
    total = 0
    for run in head_runs(pattern, shape.heads, shape.kv_heads, group_size):
        lead, groups, tail = ends(length, group_size, run.shift)
        pairs = _pairs_in_row(lead) + groups * _pairs_in_row(group_size) + _pairs_in_row(tail)
        total += (run.query.stop - run.query.start) * pairs
    return total


def forward_flops(
    shape: ModelShape,
    length: int,
    group_size: int | None = None,
    *,
    causal: bool = False,
    pattern: AttentionPattern = S2,
) -> Flops:
    """FLOPs of one forward pass over one document of `length` tokens.

    Args:
        group_size: tokens in a group of S²; None for full attention.
        causal: count only the pairs a causal kernel computes; otherwise the paper's dense count.
    """
    layers = Counter((window, group_size if window is None else None) for window in shape.windows)
    layers[None, group_size] -= shape.unshifted
    layers[None, None] += shape.unshifted
    pairs = sum(
        count * attended_pairs(shape, length, window, group, causal=causal, pattern=pattern)
        for (window, group), count in layers.items()
    )
    rotated = shape.rotary_dim * (shape.heads + shape.kv_heads) * len(shape.windows)
    elementwise = 4 * shape.norm_elements + 3 * rotated + 2 * shape.hidden * shape.layers
    return Flops(
        attention=2.0 * pairs * (shape.head_dim + shape.value_dim),
        projections=2.0 * length * shape.projection_weights,
        ffn=2.0 * length * (shape.ffn_weights + shape.ffn_width * shape.layers),
        others=length * (2.0 * shape.head_weights + elementwise),
    )


def step_flops(
    shape: ModelShape,
    length: int,
    group_size: int | None = None,
    kind: StepKind = USUAL_STEP,
    *,
    pattern: AttentionPattern = S2,
) -> Flops:
    """FLOPs of forward, recomputation and backward over one document, causal pairs only.

    A frozen matrix costs one product of its forward size in the backward pass (its input's
    gradient), a trained one two. With checkpointing the layers run forward once more.
    """
    forward = forward_flops(shape, length, group_size, causal=True, pattern=pattern)
    again = 1 if kind.checkpointing else 0
    backward = 2 if kind.trains_base else 1
    head = 2.0 * length * shape.head_weights
    return Flops(
        attention=forward.attention * (1 + again + (FLASH_BACKWARD if kind.flash else 2)),
        projections=forward.projections * (1 + again + backward)
        + 2.0 * length * kind.lora_weights * (3 + again),
        ffn=forward.ffn * (1 + again + backward + (1 if kind.tiled_mlp else 0)),
        others=head * (1 + backward) + (forward.others - head) * (2 + again),
    )

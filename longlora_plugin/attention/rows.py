"""Tokens of a batch as rows of one matrix: taken out, and put back, at one copy each way.

Autograd's backward of `index_select` and of `x[index]` adds into zeros, with atomics on a GPU.
Here the way back is always known, so it is a copy as well.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

from longlora_plugin.attention.packing import Documents


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        index: torch.Tensor,
        back: torch.Tensor | None,
        real: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(back, real)
        ctx.rows = x.shape[0]
        return x.index_select(0, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        back, real = ctx.saved_tensors
        if back is not None:
            grad = grad.index_select(0, back)
        if real is not None:
            grad = grad.new_zeros(ctx.rows, *grad.shape[1:]).index_copy_(0, real, grad)
        return grad, None, None, None


def take_rows(
    x: torch.Tensor,
    index: torch.Tensor,
    back: torch.Tensor | None,
    real: torch.Tensor | None,
) -> torch.Tensor:
    """`x[index]`, where it is known which row each gradient comes from.

    Args:
        x: [M, …].
        index: int64 [P].
        back: int64 [T], which of the P gradients is that of each row in use. Others of the P must
            be repetitions whose gradient is zero. None: P is T, in the same order.
        real: int64 [T], the rows of `x` in use; None: all of them, in order.
    """
    return _TakeRows.apply(x, index, back, real)


def of_one_size(*qkv: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Query, key and value with the one head size that fused kernels want.

    The zeros change neither scores nor the columns that are kept (MLA).
    """
    size = max(x.shape[-1] for x in qkv)
    return tuple(
        x if x.shape[-1] == size else functional.pad(x, (0, size - x.shape[-1])) for x in qkv
    )


def flatten(x_BNhD: torch.Tensor, documents: Documents) -> torch.Tensor:
    """[B, N, h, D] → [T, h, D], real tokens only."""
    x = x_BNhD.flatten(0, 1)
    real = documents.real_on(x.device)
    return x if real is None else take_rows(x, real, None, real)


def unflatten(x_ThD: torch.Tensor, documents: Documents) -> torch.Tensor:
    """[T, h, D] → [B, N, h, D], zero at padding."""
    real = documents.real_on(x_ThD.device)
    if real is not None:
        out = x_ThD.new_zeros(documents.batch * documents.length, *x_ThD.shape[1:])
        x_ThD = out.index_copy(0, real, x_ThD)
    return x_ThD.view(documents.batch, documents.length, *x_ThD.shape[1:])

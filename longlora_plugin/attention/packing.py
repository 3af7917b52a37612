"""Where documents lie in a batch, from whatever the model was given: masks, positions, boundaries.

Shapes: B rows, N tokens a row. *Flattened* means all real (not padding) tokens of all rows in
order; documents are intervals of it. Padding belongs to no document.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch

from longlora_plugin.attention.layout import Segments

PADDING = -1
"""Document number of padding in `document_ids`."""


@dataclass(frozen=True)
class Documents:
    """Documents of one batch.

    Attributes:
        batch, length: B and N.
        intervals: (first token, tokens) of each document, flattened.
        real: int64 [real tokens] on the CPU, index in B·N of each real token; None where all are
            real.
    """

    batch: int
    length: int
    intervals: Segments
    real: torch.Tensor | None = None
    _copies: dict[torch.device, torch.Tensor] = field(
        default_factory=dict, compare=False, repr=False
    )

    @property
    def are_rows(self) -> bool:
        """Each row is one document without padding: tokens can be folded instead of gathered."""
        return self.real is None and len(self.intervals) == self.batch

    @property
    def tokens(self) -> int:
        """Real tokens of all rows."""
        return sum(self.intervals[-1])

    def are_those_of(self, other: Documents) -> bool:
        """Whether both are the same documents of the same tokens."""
        if self is other:
            return True
        alike = (self.real is None) == (other.real is None) and self.intervals == other.intervals
        return alike and (self.real is None or torch.equal(self.real, other.real))

    def real_on(self, device: torch.device) -> torch.Tensor | None:
        """`real` on a device; copied once for all layers."""
        if self.real is not None and device not in self._copies:
            self._copies[device] = index_on(self.real, device)
        return self._copies.get(device)


def index_on(index: torch.Tensor, device: torch.device) -> torch.Tensor:
    """An index tensor of the CPU on `device`, without waiting for what the device is doing."""
    if device.type == "cuda":
        return index.pin_memory().to(device, non_blocking=True)
    return index.to(device)


def whole_rows(batch: int, length: int) -> Documents:
    """Every row is one document."""
    return Documents(batch, length, tuple((row * length, length) for row in range(batch)))


def from_boundaries(cu_seqlens: torch.Tensor, length: int) -> Documents:
    """One row of packed documents.

    Args:
        cu_seqlens: integer [documents + 1], from 0 to `length`, never decreasing.

    Raises:
        ValueError: the boundaries do not cover the row.
    """
    if cu_seqlens.dim() != 1 or cu_seqlens.is_floating_point():
        raise ValueError(
            f"cu_seqlens must be int32 [documents + 1], got {cu_seqlens.dtype} of shape "
            f"{list(cu_seqlens.shape)}"
        )
    cuts = cu_seqlens.tolist()
    if len(cuts) < 2 or cuts[0] != 0 or cuts[-1] != length or cuts != sorted(cuts):
        raise ValueError(
            f"cu_seqlens must rise from 0 to the row's {length} tokens, got {cuts[:8]}"
            f"{'…' if len(cuts) > 8 else ''} (last {cuts[-1] if cuts else None})"
        )
    return Documents(1, length, tuple((a, b - a) for a, b in pairwise(cuts) if b > a))


def from_ids(
    document_ids: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    *,
    batch: int,
    length: int,
) -> Documents:
    """Documents from ids and from positions that start anew; both may be missing.

    Args:
        document_ids: integer [B, N], equal ids that follow each other are one document,
            `PADDING` is padding.
        position_ids: integer [B, N] or [1, N]; a document starts where positions do not go on
            from the real token before: by one, or over a hole of padding by the hole's length.
    """
    if document_ids is None and position_ids is None:
        return whole_rows(batch, length)

    def on_host(x: torch.Tensor | None) -> np.ndarray | None:
        return None if x is None else x.expand(batch, length).reshape(-1).cpu().numpy()

    return _read(on_host(document_ids), on_host(position_ids), batch, length)


def _read(
    ids: np.ndarray | None, positions: np.ndarray | None, batch: int, length: int
) -> Documents:
    kept = np.arange(batch * length) if ids is None else np.flatnonzero(ids != PADDING)
    if not len(kept):
        return whole_rows(batch, length)  # a dummy batch: nothing looks at what comes out
    holes = np.diff(kept)
    starts = np.ones(len(kept), dtype=bool)
    starts[1:] = np.diff(kept // length) != 0
    if ids is not None:
        starts[1:] |= np.diff(ids[kept]) != 0
    if positions is not None:
        steps = np.diff(positions[kept])
        starts[1:] |= (steps != 1) & (steps != holes)
    cuts = [*np.flatnonzero(starts).tolist(), len(kept)]
    real = None if len(kept) == batch * length else torch.from_numpy(kept)
    return Documents(batch, length, tuple((a, b - a) for a, b in pairwise(cuts)), real)


def read_mask(
    mask_function: Callable[..., torch.Tensor],
    padding_mask: torch.Tensor | None,
    *,
    batch: int,
    length: int,
    device: torch.device | str,
    position_ids: torch.Tensor | None = None,
) -> tuple[torch.Tensor, Documents] | None:
    """Documents of an index-based mask function of transformers, in O(B·N) and one wait for the
    device.

    transformers describes a mask as a function of (row, head, query, key). Asked about a few
    pairs a token instead of all N × N, it says all that S² needs: whether a token sees its
    predecessor (else a document starts), its successor (else the mask is causal), and the start
    of its document (else the window is limited).

    Args:
        mask_function: takes four broadcastable index tensors.
        padding_mask: bool [B, ≥ N], True for real tokens; None where all are.
        position_ids: integer [B, N] or [1, N], as in `from_ids`.

    Returns:
        int64 [B, N] document ids, `PADDING` for padding, and the documents; None where the mask is
        not causal attention to the whole document.
    """
    rows = torch.arange(batch, device=device)[:, None]
    head = torch.zeros((), dtype=torch.long, device=device)
    here = torch.arange(length, device=device).expand(batch, -1)
    real = (
        torch.ones(batch, length, dtype=torch.bool, device=device)
        if padding_mask is None
        else padding_mask[:, :length].bool()
    )

    def sees(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return mask_function(rows, head, query, key).expand(batch, query.shape[1])

    looks_ahead = sees(here[:, :-1], here[:, 1:]).any() if length > 1 else head.bool()
    # A hole of padding inside a row must not end the document: compare with the last real token.
    last_real = torch.where(real, here, -1).cummax(dim=1).values
    previous = torch.cat([here.new_full((batch, 1), -1), last_real[:, :-1]], dim=1)
    start = real & ((previous < 0) | ~sees(here, previous.clamp(min=0)))
    if position_ids is not None:
        positions = position_ids.to(device).expand(batch, length)
        steps = positions - positions.gather(1, previous.clamp(min=0))
        start |= real & (steps != 1) & (steps != here - previous)
    first = torch.where(start, here, 0).cummax(dim=1).values
    sees_all = (sees(here, first) | ~real).all()
    ids = torch.where(real, start.cumsum(dim=1), PADDING)
    plain = (sees_all & ~looks_ahead).long()
    host = torch.cat([ids.flatten(), plain[None]]).cpu().numpy()
    return (ids, _read(host[:-1], None, batch, length)) if host[-1] else None

"""The processes that share rows, and the row that is in the model now, gathered from all of them.

Only position ids travel, 8 bytes a token, once a forward pass and never in a recomputation. What
comes of them is the same on every process, errors included (`shards.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.weak import WeakTensorKeyDictionary

from longlora_plugin.attention.call import AttentionCall
from longlora_plugin.attention.eligibility import check_shardable
from longlora_plugin.attention.forwards import Forward
from longlora_plugin.attention.halo import Attend, exchange_of, sharded_attention
from longlora_plugin.attention.packing import PADDING
from longlora_plugin.attention.registries import are_document_ids
from longlora_plugin.attention.shards import Exchange, Row

PROBLEMS = (
    "",
    "a process was given no position_ids; shards need those of their tokens in the whole row, "
    "starting anew where a packed document starts: pass position_ids [rows, tokens]",
    "a process was given position_ids of another shape than its tokens; pass [rows, tokens of the "
    "shard]",
    "a process was given an attention_mask that is not [rows, tokens of the shard]; pass none, or "
    "a 2-D one that is 0 at padding",
)


class Shards:
    """The processes that share rows, and the rows that are in the model now.

    Args:
        group: every process of it holds one shard; ranks follow the order of tokens.

    Attributes:
        exchange: what the first layer that attended exchanged.

    Raises:
        ValueError: this process is not in the group.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError(
                "process_group does not contain this process; every process enables shifted "
                "attention with the group that it shares its own rows with"
            )
        self.exchange: Exchange | None = None
        self._rows = WeakTensorKeyDictionary()

    def gather(
        self,
        position_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        *,
        batch: int,
        length: int,
        device: torch.device,
    ) -> Row:
        """Put the row together from all processes, 8 bytes a token: once a forward pass.

        Args:
            position_ids: integer [B, n] or [1, n], of this shard's tokens in the whole row.
            attention_mask: [B, n], 0 at padding; None where all tokens are real.
            batch, length: B and n.

        Raises:
            ValueError: on every process alike: one was given no positions or such of another
                shape, shards do not fit together, or positions are out of order.
        """
        problem = _problem(position_ids, attention_mask, batch, length)
        header = torch.tensor([problem, batch, length], device=device)
        headers = torch.stack(self._all_gather(header)).tolist()
        self._check(headers)
        lengths = [length for _, _, length in headers]
        shared = torch.full((batch, max(lengths)), PADDING, dtype=torch.long, device=device)
        if position_ids is not None and length:
            positions = position_ids.to(device).expand(batch, length)
            if attention_mask is not None:
                positions = positions.masked_fill(attention_mask.to(device) == 0, PADDING)
            shared[:, :length] = positions
        gathered = torch.stack(self._all_gather(shared)).cpu().numpy()
        return Row.of([each[:, :n] for each, n in zip(gathered, lengths, strict=True)], self.rank)

    def gather_for_model(
        self,
        position_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        tokens_BN: torch.Tensor,
    ) -> Row:
        """`gather` for a model's forward pass.

        Raises:
            ValueError: in addition, some process has no tokens.
        """
        batch, length = tokens_BN.shape
        device = tokens_BN.device
        row = self.gather(position_ids, attention_mask, batch=batch, length=length, device=device)
        if 0 in row.lengths:
            raise ValueError(
                f"processes hold {', '.join(map(str, row.lengths))} tokens of a row; a model "
                "cannot run without tokens: cut rows so that every process of the group has some"
            )
        return row

    def row_of(
        self,
        forward: Forward | None,
        tokens_BN: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
    ) -> Row:
        """The row of a layer.

        Args:
            forward: the pass that runs; None in a recomputation.
            attention_mask, position_ids: what the layer was given.
        """
        if forward is None:
            return self.recall(attention_mask, position_ids)
        if forward.row is None:
            if attention_mask is not None and not are_document_ids(attention_mask):
                forward.attention_mask = attention_mask  # a custom one, which is refused
            forward.row = self.gather_for_model(
                forward.position_ids, forward.attention_mask, tokens_BN
            )
        self.remember(forward.row, attention_mask, position_ids)
        return forward.row

    def attend(
        self,
        attend: Attend,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        call: AttentionCall,
        row: Row,
    ) -> torch.Tensor:
        """`sharded_attention` in this group."""
        if self.exchange is None:
            self.exchange = exchange_of(row, key, value, call)
        return sharded_attention(attend, query, key, value, call, row, self.group)

    def remember(self, row: Row, *arguments: Any) -> None:
        """Note the row of the tensors that layers are given: recomputation gets the same ones."""
        for each in arguments:
            if isinstance(each, torch.Tensor):
                self._rows[each] = row

    def recall(self, *arguments: Any) -> Row:
        """The row of a layer that runs outside a forward pass, in recomputation.

        Raises:
            ValueError: none of its arguments is known.
        """
        for each in arguments:
            if isinstance(each, torch.Tensor) and each in self._rows:
                return self._rows[each]
        raise ValueError(
            "shifted attention over several processes ran outside the forward pass of its model "
            "and cannot tell of which row; run whole models, and if a layer was recomputed, "
            "switch gradient checkpointing off"
        )

    def _all_gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        every = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(every, x.contiguous(), group=self.group)
        return every

    def _check(self, headers: list[list[int]]) -> None:
        for rank, (problem, _, _) in enumerate(headers):
            if problem:
                raise ValueError(
                    f"shifted attention over several processes: {PROBLEMS[problem]} (process "
                    f"{rank} of the group)"
                )
        shapes = [(batch, length) for _, batch, length in headers]
        if len({batch for batch, _ in shapes}) > 1:
            raise ValueError(
                f"processes that share rows have unequal shards, [rows, tokens]: "
                f"{', '.join(str(list(shape)) for shape in shapes)}; all must have as many "
                "rows: every process of the group needs the same batch before it is cut"
            )


def shards_of(
    model: torch.nn.Module, skipped: Mapping[str, int], process_group: dist.ProcessGroup | None
) -> Shards | None:
    """The processes that share `model`'s rows; None where no other does.

    Raises:
        ValueError: as `Shards` and `check_shardable`.
    """
    if process_group is None:
        return None
    check_shardable(model, skipped)
    shards = Shards(process_group)
    return shards if shards.size > 1 else None


def _problem(
    position_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    batch: int,
    length: int,
) -> int:
    if position_ids is None:
        return 1
    if tuple(position_ids.shape) not in ((batch, length), (1, length)):
        return 2
    if attention_mask is not None and tuple(attention_mask.shape) != (batch, length):
        return 3
    return 0

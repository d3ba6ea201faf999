"""Rows that travel by count: what one rank gives to `exchange_rows`, and what it takes from it.

How many rows go where is only known when a program runs. The counts are exchanged first, so each
member knows how many rows it gets from each other, and only those are sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Rows:
    """`tensor[n, ...]`, of which the first `sent[0]` rows go to the first member of a group, the
    next `sent[1]` to the second and so on. This rank gets `received[i]` rows from the i-th, at the
    front of a tensor of `maximum` rows, which is zero behind them.

    Rows beyond the maximum are lost, and those that are to be sent and are not there are zeros:
    whoever counts has noted it, and the step that goes on is undone.
    """

    tensor: Tensor
    sent: Sequence[int]
    received: Sequence[int]
    maximum: int

    @property
    def shape(self) -> torch.Size:
        """The shape of the tensor."""
        return self.tensor.shape

    @property
    def dtype(self) -> torch.dtype:
        """The element type of the rows."""
        return self.tensor.dtype

    def given(self) -> Tensor:
        """The rows to send, in one block of memory."""
        tensor, total = self.tensor, sum(self.sent)
        if total > len(tensor):
            rest = tensor.new_zeros((total - len(tensor), *tensor.shape[1:]))
            tensor = torch.cat([tensor, rest])
        return tensor[:total].contiguous()

    def taken(self) -> tuple[Tensor, Tensor]:
        """The result, and the block of memory that rows come to, at its front."""
        total = sum(self.received)
        whole = self.tensor.new_empty((max(total, self.maximum), *self.tensor.shape[1:]))
        whole[total:].zero_()
        return whole[: self.maximum], whole[:total]


@dataclass(slots=True)
class Room:
    """The most rows that came to this rank in an exchange of a step, by the exchange's number."""

    needed: dict[int, int] = field(default_factory=dict)

    def counted(
        self, number: int, maximum: int, tensor: Tensor, sent: Tensor, received: Tensor
    ) -> Rows:
        """The rows to exchange; waits for the counts."""
        to, of = torch.stack([sent.reshape(-1), received.reshape(-1)]).tolist()
        self.needed[number] = max(self.needed.get(number, 0), sum(of))
        return Rows(tensor, to, of, maximum)


class HasRoom(Protocol):
    """Something of one rank with the counts of its exchanges."""

    @property
    def room(self) -> Room: ...


def counting(number: int, maximum: int, context: HasRoom) -> partial[Rows]:
    """What makes the operand of an exchange on one rank, given rows and both counts."""
    return partial(context.room.counted, number, maximum)

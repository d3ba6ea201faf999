"""Collectives of a device's tensors through host memory, for ranks that share a device.

NCCL does not have two ranks on one device. Here an operand is copied to host memory, which is
pinned for a GPU, another group carries it from there, and its result is copied to the device.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from meshwright.compiler.layout.rows import Rows
from meshwright.compiler.layout.wires import Wire
from meshwright.runtime.transports.gloo import GlooGroup
from meshwright.runtime.transports.native import Begun
from meshwright.runtime.transports.shared import SharedGroup


def asked_for() -> bool:
    """Whether the environment has `MESHWRIGHT_THROUGH_HOST=1`."""
    return os.environ.get("MESHWRIGHT_THROUGH_HOST") == "1"


class StagedGroup:
    """The processes of one group, whose tensors on `device` the group `carrier` moves.

    A start waits until its operand has left the device, so what the device computes meanwhile is
    not hidden; a wait does not wait for the copy back, which is in the order of the device's work.
    """

    def __init__(self, carrier: GlooGroup | SharedGroup, device: torch.device) -> None:
        self.carrier, self.device = carrier, device
        self.members, self.size, self.position = carrier.members, carrier.size, carrier.position

    def begin(self, wire: Wire, tensor: Any, started: bool, donate: bool) -> Begun:
        """Bring the operand to host memory, and post the collective there."""
        if wire.kind == "transfer":
            return self._transfer(wire, tensor, started)
        whole = tensor.tensor if isinstance(tensor, Rows) else tensor
        away = self._away(whole)
        given: Any = replace(tensor, tensor=away) if isinstance(tensor, Rows) else away
        works, finish = self.carrier.begin(wire, given, started, True)
        return works, partial(self._back, finish, whole if donate else None)

    def abort(self) -> None:
        """Make a thread that waits for another member return with an error."""
        self.carrier.abort()

    def close(self) -> None:
        """Let go of the group that carries."""
        self.carrier.close()

    def _transfer(self, wire: Wire, tensor: Tensor, started: bool) -> Begun:
        """Send an operand, or receive into it."""
        receives = self.position == 1
        away = self._host_like(tensor) if receives else self._away(tensor)
        works, finish = self.carrier.begin(wire, away, started, True)

        def finished() -> Tensor:
            came = finish()
            return tensor.copy_(came, non_blocking=True) if receives else tensor

        return works, finished

    def _away(self, tensor: Tensor) -> Tensor:
        """A copy in host memory, once it is there."""
        away = self._host_like(tensor).copy_(tensor, non_blocking=True)
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        return away

    def _back(self, finish: Callable[[], Tensor], out: Tensor | None) -> Tensor:
        """The result on the device, in the memory of `out` where that fits."""
        result = finish()
        if self.device.type == "cuda" and not result.is_pinned():
            result = self._host_like(result).copy_(result)
        if out is None or out.shape != result.shape or not out.is_contiguous():
            out = torch.empty(result.shape, dtype=result.dtype, device=self.device)
        return out.copy_(result, non_blocking=True)

    def _host_like(self, tensor: Tensor) -> Tensor:
        """Contiguous host memory, which torch does not use again while a copy from it is under
        way."""
        pinned = self.device.type == "cuda"
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)

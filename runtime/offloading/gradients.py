"""Gradients that leave the device as they are reduced."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from meshwright.compiler.codegen.linking import FlatBuffer
from meshwright.compiler.program import Place
from meshwright.runtime.offloading.stores import Stores


class Leaving(FlatBuffer):
    """A flat buffer on the device, whose gradients stay in another at `place`."""

    def __init__(
        self, shapes: Sequence[Sequence[int]], dtype: torch.dtype, stores: Stores, place: Place
    ) -> None:
        super().__init__(shapes, dtype, stores.device)
        self._stores, self._place = stores, place
        self._home = FlatBuffer(
            shapes,
            dtype,
            torch.device("cpu"),
            lambda length: stores.hold(place, (length,), dtype),
        )
        self._moving: Any = None

    @property
    def home(self) -> FlatBuffer:
        return self._home

    def leave(self) -> Leaving:
        self._home.allocate()
        self._moving = self._stores(self._place.path).carry(self.flat, self._home.flat)
        return self

    def wait(self) -> None:
        """Let go of the memory on the device, once what it has computed there has left."""
        self._moving.wait()
        self.release()

    def settle(self) -> None:
        if self._moving is not None:
            self._moving.settle()
            self._moving = None

"""The places to which a rank's tensors are moved, by what a plan calls them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from meshwright.compiler.program import Place
from meshwright.runtime.offloading.disk import DiskStore
from meshwright.runtime.offloading.host import HostStore


class Resident:
    """A tensor that stays in host memory or in a file: the device takes copies of it."""

    def __init__(self, store: HostStore | DiskStore, tensor: Tensor) -> None:
        self.store, self.tensor = store, tensor

    def fetch(self) -> Any:
        """Begin to bring a copy to the device."""
        return self.store.bring(self.tensor)


class Stores:
    """Host memory and folders in which one rank keeps tensors; each is made when it is first asked
    for, and shared by every program of a run."""

    def __init__(self, device: torch.device, rank: int) -> None:
        self.device, self.rank = device, rank
        self.by_path: dict[str | None, HostStore | DiskStore] = {}

    def __call__(self, path: str | None) -> HostStore | DiskStore:
        """Host memory or, given a folder, files there."""
        if path not in self.by_path:
            self.by_path[path] = (
                HostStore(self.device) if path is None else DiskStore(path, self.device, self.rank)
            )
        return self.by_path[path]

    def __repr__(self) -> str:
        return f"<Stores of rank {self.rank}: {list(self.by_path.values())}>"

    def hold(self, place: Place, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor of undefined values in host memory or in a file."""
        return self(place.path).hold(shape, dtype)

    def resident(self, place: Place, tensor: Tensor) -> Resident:
        """What brings a tensor that stays there to the device."""
        return Resident(self(place.path), tensor)

    def close(self) -> None:
        """Let go of files."""
        for store in self.by_path.values():
            if isinstance(store, DiskStore):
                store.close()

"""Count the bytes of the storages that operators make."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class StorageCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the storages that operators make, while they live."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.made: dict[int, tuple[ref[torch.UntypedStorage], int]] = {}
        """By address: the storages that live, and their bytes."""
        self.alive = self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = self.run(func, args, kwargs or {})
        given = {address(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(result):
            if not isinstance(tensor, Tensor):
                continue
            key = address(tensor)
            if key not in given and key not in self.made:
                self.made_by(func, tensor)
        self.peak = max(self.peak, self.alive)
        return result

    def run(self, function: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
        """The result of an operator."""
        return function(*args, **kwargs)

    def made_by(self, function: Any, tensor: Tensor) -> None:
        """Count a storage that an operator has made."""
        key, storage = address(tensor), tensor.untyped_storage()
        self.made[key] = ref(storage, partial(self._gone, key)), storage.nbytes()
        self.alive += storage.nbytes()

    def _gone(self, key: int, _: object) -> None:
        _, num_bytes = self.made.pop(key)
        self.alive -= num_bytes


def address(tensor: Tensor) -> int:
    """The address of a tensor's storage, equal for tensors that share memory."""
    return int(tensor.untyped_storage()._cdata)

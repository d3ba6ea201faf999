"""Count the bytes of the storages that operators make."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class StorageCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the storages that operators make, while they live."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {address(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        # Before results are looked at: a new storage may have the address of one that is gone.
        self.alive()
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and address(tensor) not in given | self.made.keys():
                storage = tensor.untyped_storage()
                reference = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
                self.made[address(tensor)] = (reference, storage.nbytes())
        self.peak = max(self.peak, self.alive())
        return result

    def alive(self) -> int:
        """The bytes of the storages that still live."""
        for key, (reference, _) in list(self.made.items()):
            if reference.expired():  # type: ignore[no-untyped-call]
                del self.made[key]
        return sum(size for _, size in self.made.values())


def address(tensor: Tensor) -> int:
    """The address of a tensor's storage, equal for tensors that share memory."""
    return int(tensor.untyped_storage()._cdata)

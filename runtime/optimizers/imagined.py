"""A rank without memory, on which an optimizer is tried out: its tensors are fake.

What is kept away from the device is on the CPU here too, in stores that are as empty.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from meshwright.compiler.codegen.linking import FlatBuffer, RandomState
from meshwright.compiler.graph.types import Fakes
from meshwright.compiler.public import Program
from meshwright.compiler.report.memory.counter import address
from meshwright.compiler.schedules.actions import actions_of
from meshwright.runtime.buckets import owners_of
from meshwright.runtime.rank import RankState

_CPU = torch.device("cpu")


class Imagined(RankState):
    """A rank whose parameters and gradients are fake; those of `away` are updated elsewhere, and
    have their gradients only after `go_elsewhere`."""

    def __init__(self, program: Program, rank: int, fakes: Fakes) -> None:
        # Where there is no such device its kernels take as much on another.
        there = program.imagined_on.type != "cuda" or torch.cuda.is_available()
        self.device = program.imagined_on if there else _CPU
        self.mesh, self.rank = program.mesh, rank
        self.coords = program.mesh.coords(rank)
        self.random, self.num_updates = RandomState(), 0
        self.parameters: dict[str, nn.Parameter] = {}
        self.stored = {("parameter", name): each for name, each in program.parameters.items()}
        self.flats: list[Tensor] = []
        self.away: dict[str, Tensor] = {}
        """The gradients that are not on the device."""
        self._flats_away: list[Tensor] = []
        with fakes:
            for name, stored in program.parameters.items():
                if stored.held_by(self.coords):
                    shape, dtype = stored.layout.local_shape(self.mesh), stored.type.dtype
                    device = _CPU if stored.kept.update.away else self.device
                    local = torch.empty(shape, dtype=dtype, device=device)
                    self.parameters[name] = nn.Parameter(local, requires_grad=stored.requires_grad)
                    self.parameters[name].grad_dtype = None
            entries = {(a.stage, a.kind) for a in actions_of(program.entries[rank])}
            for stage, phase in entries:
                buckets = owners_of(program.stages[stage].graphs[phase]).values()
                for owners, node in buckets:
                    shapes = [part.placed.local_shape(self.mesh) for part in node.args]
                    leaves = bool(node.kwargs.get("leaves"))
                    device = _CPU if leaves else self.device
                    self._give(owners, FlatBuffer(shapes, node.tensor.dtype, device), away=leaves)

    def _give(self, owners: Iterable[str], buffer: FlatBuffer, *, away: bool) -> None:
        buffer.allocate()
        gradients = dict(zip(owners, buffer.gradients, strict=True))
        if away:
            self.away.update(gradients)
            self._flats_away.append(buffer.flat)
            return
        self.flats.append(buffer.flat)
        for owner, gradient in gradients.items():
            self.parameters[owner].grad = gradient

    def go_elsewhere(self, kept_in: Callable[[bool], AbstractContextManager[None]]) -> None:
        """From here on, let only the parameters of `away` have gradients, and keep in stores what
        is kept of them; `kept_in` is open while one makes a tensor, in a file or not."""
        host, disk = _ImaginedStore(kept_in, False), _ImaginedStore(kept_in, True)
        self.stores: Any = lambda path: host if path is None else disk
        self.device, self.flats = _CPU, self._flats_away
        for name, parameter in self.parameters.items():
            parameter.grad = self.away.get(name)

    def follow(self, name: str) -> None:
        """Nothing computes with the values that the device would have."""

    def flat_gradients(self) -> list[Tensor]:
        return self.flats


class _ImaginedStore:
    """A store that holds fake tensors; nothing is read or written."""

    def __init__(
        self, kept_in: Callable[[bool], AbstractContextManager[None]], is_disk: bool
    ) -> None:
        self._kept_in, self._is_disk = kept_in, is_disk
        self._held: WeakValueDictionary[int, torch.UntypedStorage] = WeakValueDictionary()
        """The memory of what stays here, by address."""

    def hold(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        with self._kept_in(self._is_disk):
            tensor = torch.empty(shape, dtype=dtype)
        self._held[address(tensor)] = tensor.untyped_storage()
        return tensor

    def has(self, tensor: Tensor) -> bool:
        return address(tensor) in self._held

    def ahead(self, tensor: Tensor) -> None:
        pass

    def wait(self, tensor: Tensor) -> None:
        pass

    def settle(self, tensor: Tensor) -> None:
        pass

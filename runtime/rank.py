"""The tensors of one rank: its shards and its flat gradient buffers."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from meshwright.compiler.codegen.linking import FlatBuffer, LossScale, RandomState
from meshwright.compiler.graph.aliasing import is_allocated
from meshwright.compiler.graph.ir import Node, Output
from meshwright.compiler.layout.layout import shard
from meshwright.compiler.layout.rows import Room
from meshwright.compiler.program import Stored
from meshwright.compiler.public import Program
from meshwright.runtime.errors import RunError
from meshwright.runtime.offloading.gradients import Leaving
from meshwright.runtime.offloading.parameters import HostParameter
from meshwright.runtime.offloading.stores import Stores

RankProgram = Generator[Any, Any, Any]
"""One rank's part of a computation; yields what a transport is to carry, and gets the results."""
Results = dict[Output, Tensor]
"""The results of a step: loss, outputs and new values of buffers."""
Values = Callable[[Stored], Tensor]
"""The global value of a parameter or buffer."""


class RankState:
    """The tensors of one rank, shared by every program that runs on it.

    `parameters` and `tensors` are those that this rank holds a part of; `stored` has all of the
    program's, and is the same on every rank.
    """

    def __init__(self, program: Program, rank: int, values: Values) -> None:
        self.mesh, self.device, self.rank = program.mesh, _indexed(program.device), rank
        self.coords = program.mesh.coords(rank)
        self.random, self.loss_scale, self.room = RandomState(), LossScale(), Room()
        self.stores = Stores(self.device, rank)
        """Where values are kept that leave the device."""
        self.num_updates = 0
        """The number of optimizer steps so far, of which a load takes over the saved one."""
        self.parameters: dict[str, nn.Parameter] = {}
        self.tensors: dict[tuple[str, str], Tensor] = {}
        """What graphs take as inputs, by kind and name; without autograd."""
        self.stored: dict[tuple[str, str], Stored] = {}
        """How ranks hold each parameter and buffer of the program, by kind and name."""
        self.unset: dict[str, RunError | None] = {}
        """The parameters and buffers that have no values yet, and why, if something failed."""
        self._buckets: dict[Any, FlatBuffer] = {}
        self._lasting: set[Any] = set()
        """The keys of buffers that always have memory."""
        self._followed: dict[str, int] = {}
        """The version of each that is updated elsewhere, as the device has it."""
        self._homes: dict[str, Tensor] = {}
        """The memory of `parameters`: that of `tensors`, unless they are updated elsewhere."""
        for name, stored in program.parameters.items():
            local = self._hold("parameter", stored, values)
            if local is not None:
                home = self._homes[name] = self._home(stored, local)
                kind = nn.Parameter if home is local else HostParameter
                parameter = kind(home, requires_grad=stored.requires_grad)
                parameter.grad_dtype = None  # gradients of bfloat16 may be float32
                self.parameters[name] = parameter
                self.follow(name)
        for stored in program.buffers.values():
            self._hold("buffer", stored, values)
        self.apart = program.apart
        self.holders = self.mesh.group(0, self.apart)
        """The first of each set of ranks that hold parts of the same tensors: between them these
        ranks hold a part of each. Rank 0 alone where every rank holds a part of each."""

    def __repr__(self) -> str:
        return f"<RankState: rank {self.rank} of mesh {self.mesh}, on {self.device}>"

    @property
    def progress(self) -> tuple[int, int]:
        """The numbers of steps of this rank, and of its optimizers."""
        return self.random.step, self.num_updates

    def _hold(self, kind: str, stored: Stored, values: Values) -> Tensor | None:
        """This rank's part of a tensor, in `tensors` from now on; None if it does not hold one."""
        self.stored[kind, stored.name] = stored
        if not stored.held_by(self.coords):
            return None
        local, place = self.local(values(stored), stored), stored.kept.value
        if place.away:
            local = self.stores.hold(place, local.shape, local.dtype).copy_(local)
        self.tensors[kind, stored.name] = local
        return local

    def _home(self, stored: Stored, local: Tensor) -> Tensor:
        """The memory in which a parameter is updated."""
        place = stored.kept.update
        if stored.kept.value.away or not place.away:
            return local
        return self.stores.hold(place, local.shape, local.dtype).copy_(local)

    def assign(self, key: tuple[str, str], value: Tensor) -> None:
        """Give this rank's part of a parameter or buffer another value."""
        self.tensors[key].copy_(value)
        self.assigned(key)

    def assigned(self, key: tuple[str, str]) -> None:
        """Let what is updated elsewhere follow a value that was written."""
        kind, name = key
        if kind == "parameter" and self._homes[name] is not self.tensors[key]:
            self._homes[name].copy_(self.tensors[key])
            self._followed[name] = self.parameters[name]._version

    def follow(self, name: str) -> None:
        """Let the device have the value of a parameter that was updated elsewhere."""
        home, held = self._homes[name], self.tensors["parameter", name]
        if home is not held:
            held.copy_(home, non_blocking=True)
            self._followed[name] = self.parameters[name]._version

    @torch.no_grad()
    def follow_written(self) -> None:
        """Let steps take the values that somebody has written to parameters, or assigned to their
        `data`, and let the device have them."""
        self._take_assigned()
        for name, version in self._followed.items():
            if self.parameters[name]._version != version:
                self.follow(name)

    def held(self, kind: str, stored: Stored) -> Tensor:
        """This rank's part of a parameter or buffer; on the meta device if it does not hold one."""
        found = self.tensors.get((kind, stored.name))
        if found is None:
            shape, dtype = stored.layout.local_shape(self.mesh), stored.type.dtype
            return torch.empty(shape, dtype=dtype, device="meta")
        return found

    def local(self, value: Tensor, stored: Stored) -> Tensor:
        """This rank's part of a global tensor, in memory of its own; of one without values, NaN or
        zeros."""
        value = stored.padded(value.detach())
        part = shard(value, stored.layout, self.mesh, self.coords)
        device = torch.device("cpu") if stored.kept.value.away else self.device
        if part.is_meta:
            number = torch.nan if stored.type.differentiable else 0
            return torch.full(part.shape, number, dtype=stored.type.dtype, device=device)
        return part.to(device, stored.type.dtype).clone(memory_format=torch.contiguous_format)

    def updated(self) -> None:
        """Count an update, and take what an optimizer assigned to the `data` of parameters."""
        self.num_updates += 1
        self._take_assigned()

    def _take_assigned(self) -> None:
        """Write what was assigned to the `data` of a parameter into the tensor that steps take."""
        for name, parameter in self.parameters.items():
            home = self._homes[name]
            # While 16 bits are updated in float32, another tensor stands in for the parameter.
            if parameter.data_ptr() != home.data_ptr() and parameter.dtype == home.dtype:
                home.copy_(parameter.data)
                parameter.data = home
                self.follow(name)

    def flat_buffer(self, owners: tuple[str, ...], node: Node) -> FlatBuffer:
        """The flat buffer of a bucket, shared by programs that fill it alike."""
        shapes = tuple(part.placed.local_shape(self.mesh) for part in node.args)
        key = (owners, shapes, node.tensor.dtype)
        if key not in self._buckets:
            place = self.stored["parameter", owners[0]].kept.update
            found = self._buckets[key] = (
                Leaving(shapes, node.tensor.dtype, self.stores, place)
                if place.away
                else FlatBuffer(shapes, node.tensor.dtype, self.device)
            )
            if not is_allocated(node, self.mesh):
                found.allocate()
                self._lasting.add(key)
        return self._buckets[key]

    def release_buffers(self) -> None:
        """Let go of the memory of flat buffers in which no parameter has its gradient any more,
        but of small ones."""
        for key in self._buckets.keys() - self._lasting:
            buffer, gradients = self._buckets[key], (self.parameters[n].grad for n in key[0])
            if buffer.home is not buffer:
                buffer.release()
            if not any(a is b for a, b in zip(gradients, buffer.home.gradients, strict=False)):
                buffer.home.release()

    def flat_gradients(self) -> list[Tensor]:
        """The gradients of this rank; those that fill a bucket, as its flat buffer."""
        left = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        found: list[Tensor] = []
        for (owners, *_), bucket in self._buckets.items():
            buffer = bucket.home
            pairs = zip(owners, buffer.gradients, strict=False)
            if not buffer.released and all(left.get(name) is own for name, own in pairs):
                found.append(buffer.flat)
                for name in owners:
                    del left[name]
        return [*found, *left.values()]


def close_stores(states: Iterable[RankState]) -> None:
    """Let go of the files in which these ranks keep values."""
    for state in states:
        state.stores.close()


def _indexed(device: torch.device) -> torch.device:
    """The device with its index, so that it equals that of the tensors on it."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device

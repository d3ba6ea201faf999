"""What one rank holds: its shards, its flat gradient buffers, and its copy of the generated code."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from meshwright.compiler.bindings import RandomState
from meshwright.compiler.codegen import Pending, RankContext
from meshwright.compiler.collectives import Wait
from meshwright.compiler.ir import Graph
from meshwright.compiler.layout import shard
from meshwright.compiler.local_steps import apply_all
from meshwright.compiler.mesh import Mesh
from meshwright.compiler.program import Program, Stored
from meshwright.compiler.reshard import steps

RankProgram = Generator[Any, Any, Any]


class RankState:
    """The tensors of one rank, shared by every program that runs on it."""

    def __init__(
        self, program: Program, rank: int, values: Callable[[Stored], Tensor], seed: int
    ) -> None:
        self.mesh, self.device = program.mesh, program.device
        self.coords = program.mesh.coords(rank)
        self.random = RandomState(seed)
        self.parameters: dict[str, nn.Parameter] = {}
        self.tensors: dict[tuple[str, str], Tensor] = {}
        """What graphs take as inputs, by kind and name; without autograd."""
        self.grad_views: dict[str, Tensor] = {}
        self.buckets: dict[str, tuple[Tensor, ...]] = {}
        for stored in program.parameters.values():
            self._hold(stored, values(stored))
        for stored in program.buffers.values():
            self.tensors["buffer", stored.name] = self.local(values(stored), stored)
        self._make_buckets(program)

    def _hold(self, stored: Stored, value: Tensor) -> None:
        local = self.local(value, stored)
        self.tensors["parameter", stored.name] = local
        self.parameters[stored.name] = nn.Parameter(local, requires_grad=stored.requires_grad)

    def local(self, value: Tensor, stored: Stored) -> Tensor:
        """This rank's part of a global tensor, in memory of its own."""
        part = shard(padded(value.detach(), stored), stored.layout, self.mesh, self.coords)
        return part.to(self.device).clone(memory_format=torch.contiguous_format)

    def replicated(self, program: Program) -> Iterator[tuple[Tensor, tuple[str, ...]]]:
        """Every parameter and buffer here that other ranks hold too, with the axes they are along."""
        for kind, every in (("parameter", program.parameters), ("buffer", program.buffers)):
            for stored in every.values():
                split = stored.layout.split_axes
                axes = tuple(a for a, n in self.mesh.axes if a not in split and n > 1)
                if axes:
                    yield self.tensors[kind, stored.name], axes

    def _make_buckets(self, program: Program) -> None:
        """One flat buffer a bucket; every trained parameter's gradient is a view of one."""
        graph = program.step.backward
        if graph is None:
            return
        owner = {
            (node.args[0].name if node.args[0].op.name == "bucket" else node.args[0].args[0].name,
             node.args[1]): label.removeprefix("gradient:")
            for label, node in graph.outputs
        }  # fmt: skip
        for name, node in program.buckets().items():
            flat = torch.zeros(node.tensor.shape, dtype=node.tensor.dtype, device=self.device)
            views, offset = [], 0
            for i, part in enumerate(node.args):
                shape = part.placed.local_shape(self.mesh)
                views.append(flat.narrow(0, offset, math.prod(shape)).view(shape))
                offset += math.prod(shape)
                self.grad_views[owner[name, i]] = views[-1]
            self.buckets[name] = (flat, *views)

    def context(self) -> RankContext:
        """What generated code is linked with."""
        return RankContext(self.mesh, self.coords, self.device, self.random, self.buckets)


class RankStep:
    """One program linked for one rank."""

    def __init__(self, program: Program, state: RankState) -> None:
        self.program, self.state = program, state
        context = state.context()
        for name, value in program.captured.constants.items():
            state.tensors["constant", name] = value.detach().to(state.device)
        self.functions = [code.link(context) for code in program.code]
        self.labels = [
            label
            for label, _ in program.step.forward.outputs
            if not label.startswith("saved:")
        ]

    def inputs(self, graph: Graph, arguments: Mapping[str, Tensor]) -> list[Tensor]:
        """The values of a graph's inputs, in order."""
        tensors = self.state.tensors
        return [
            arguments[node.args[1]] if node.args[0] == "argument" else tensors[node.args]
            for node in graph.inputs
        ]

    def run(self, arguments: Mapping[str, Tensor]) -> RankProgram:
        """One step: forward, backward where there is one, then what is still under way.

        Returns the outputs by label; gradients are in the flat buffers.
        """
        step = self.program.step
        outputs, saved = yield from self.functions[0](self.inputs(step.forward, arguments), [])
        if step.backward is not None:
            kept = self._kept_gradients()
            yield from self.functions[1](self.inputs(step.backward, arguments), saved)
            self._give_gradients(kept)
        results: dict[str, Tensor] = {}
        for label, value in zip(self.labels, outputs, strict=True):
            results[label] = (yield Wait(value.handle)) if type(value) is Pending else value
        self._store_buffers(results)
        return results

    def _kept_gradients(self) -> dict[str, Tensor]:
        """Copies of gradients that this step must add to."""
        return {
            name: parameter.grad.clone()
            for name, parameter in self.state.parameters.items()
            if parameter.grad is not None
        }

    def _give_gradients(self, kept: Mapping[str, Tensor]) -> None:
        for name, view in self.state.grad_views.items():
            if name in kept:
                view.add_(kept[name])
            self.state.parameters[name].grad = view

    def _store_buffers(self, results: dict[str, Tensor]) -> None:
        for label in [label for label in results if label.startswith("buffer:")]:
            name = label.removeprefix("buffer:")
            self.state.tensors["buffer", name].copy_(results.pop(label))


def padded(value: Tensor, stored: Stored) -> Tensor:
    """A global tensor with the zeros that its storage adds."""
    if stored.padding is None:
        return value
    shape = list(value.shape)
    shape[stored.padding.dim] = stored.padding.padded - stored.padding.size
    return torch.cat([value, value.new_zeros(shape)], stored.padding.dim)


def gathered(local: Tensor, stored: Stored, state: RankState) -> RankProgram:
    """The global tensor, without padding, from every rank's part."""
    whole = stored.layout.drop_split(stored.layout.split_axes, state.mesh)
    for step in steps(stored.layout, whole, state.mesh):
        transfer = step.transfer(state.mesh)
        local = apply_all(transfer.before, local, state.coords, state.mesh)
        if transfer.wire is not None:
            local = yield transfer.wire, local
        local = apply_all(transfer.after, local, state.coords, state.mesh)
    if stored.padding is not None:
        local = local.narrow(stored.padding.dim, 0, stored.padding.size)
    return local.reshape(stored.type.shape)


def gathered_all(locals: Sequence[tuple[Tensor, Stored]], state: RankState) -> RankProgram:
    """Several global tensors, one after the other."""
    found: list[Tensor] = []
    for local, stored in locals:
        found.append((yield from gathered(local, stored, state)))
    return found

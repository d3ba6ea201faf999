"""What one rank holds: its shards, its flat gradient buffers, and its copies of generated code."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from meshwright.compiler.codegen.instructions import RankContext
from meshwright.compiler.codegen.linking import RandomState
from meshwright.compiler.codegen.printing import Pending
from meshwright.compiler.errors import PassError
from meshwright.compiler.graph.aliasing import storage
from meshwright.compiler.graph.ir import INPUT, Graph, MeshOp, Node, OutputKind
from meshwright.compiler.layout.collectives import Wait
from meshwright.compiler.layout.layout import shard
from meshwright.compiler.program import Stored
from meshwright.compiler.public import Program
from meshwright.dsl.errors import MeshwrightError
from meshwright.runtime.errors import operator_error

RankProgram = Generator[Any, Any, Any]
Kept = Tensor | list[tuple[Tensor, Tensor]] | None
"""The gradients of a bucket before a step: all as one, each with its view, or none."""
Values = Callable[[Stored], Tensor]
"""The global value of a parameter or buffer."""


class RankState:
    """The tensors of one rank, shared by every program that runs on it."""

    def __init__(self, program: Program, rank: int, values: Values) -> None:
        self.mesh, self.device, self.rank = program.mesh, _indexed(program.device), rank
        self.coords = program.mesh.coords(rank)
        self.random = RandomState()
        self.num_updates = 0
        """How often optimizers of this run changed the parameters since the launch or a load."""
        self.parameters: dict[str, nn.Parameter] = {}
        self.tensors: dict[tuple[str, str], Tensor] = {}
        """What graphs take as inputs, by kind and name; without autograd."""
        self.stored: dict[tuple[str, str], Stored] = {}
        self._buckets: dict[Any, tuple[Tensor, ...]] = {}
        for name, stored in program.parameters.items():
            local = self._hold("parameter", stored, values)
            self.parameters[name] = nn.Parameter(local, requires_grad=stored.requires_grad)
        for stored in program.buffers.values():
            self._hold("buffer", stored, values)

    def __repr__(self) -> str:
        return f"<RankState: rank {self.rank} of mesh {self.mesh}, on {self.device}>"

    @property
    def progress(self) -> tuple[int, int]:
        """How many steps this rank has made, and its optimizers since the launch or a load."""
        return self.random.step, self.num_updates

    def _hold(self, kind: str, stored: Stored, values: Values) -> Tensor:
        local = self.local(values(stored), stored)
        self.stored[kind, stored.name] = stored
        self.tensors[kind, stored.name] = local
        return local

    def local(self, value: Tensor, stored: Stored) -> Tensor:
        """This rank's part of a global tensor, in memory of its own."""
        part = shard(padded(value.detach(), stored), stored.layout, self.mesh, self.coords)
        return part.to(self.device, stored.type.dtype).clone(memory_format=torch.contiguous_format)

    def flat_buffer(self, owners: tuple[str, ...], node: Node) -> tuple[Tensor, ...]:
        """The flat buffer of a bucket and its views, shared by programs that fill it alike."""
        shapes = tuple(part.placed.local_shape(self.mesh) for part in node.args)
        key = (owners, shapes, node.tensor.dtype)
        if key not in self._buckets:
            sizes = [math.prod(shape) for shape in shapes]
            flat = torch.zeros(sum(sizes), dtype=node.tensor.dtype, device=self.device)
            parts = flat.split_with_sizes(sizes)
            views = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
            self._buckets[key] = (flat, *views)
        return self._buckets[key]


class RankStep:
    """One program linked for one rank; `constants` are those of the model on its device."""

    def __init__(self, program: Program, state: RankState, constants: Mapping[str, Tensor]) -> None:
        self.state, self.constants, step = state, constants, program.step
        self.paddings = {
            name: stored.padding
            for name, stored in (*program.parameters.items(), *program.buffers.items())
        }
        buckets = {
            name: state.flat_buffer(owners, node)
            for name, (owners, node) in _owners(program).items()
        }
        self.buckets = [
            _Bucket(flat, [state.parameters[name] for name in owners], views)
            for (owners, _), (flat, *views) in zip(
                _owners(program).values(), buckets.values(), strict=True
            )
        ]
        context = RankContext(state.mesh, state.coords, state.device, state.random, buckets)
        self.codes = program.code
        self.functions = [code.link(context) for code in self.codes]
        self.outputs = [o for o in step.forward.outputs if o.kind is not OutputKind.SAVED]
        self.held = {o.label for o in self.outputs if storage(o.node).op == INPUT}
        """Outputs that are a tensor which lives on, and may be written to, or a view of one."""
        self._kept: list[tuple[_Bucket, Kept]] = []
        """What each bucket held before the step that is under way, if that came to its backward."""
        places = {node.args[1]: i for i, node in enumerate(program.inputs())}
        self.inputs = [_Inputs(graph, self, places) for graph in step.graphs.values()]

    def tensor(self, node: Node) -> Tensor:
        """What this rank holds of a parameter, buffer or constant, in the layout of `node`."""
        state, (kind, name) = self.state, node.args
        if kind == "constant":
            return shard(self.constants[name], node.placed, state.mesh, state.coords)
        held, layout = state.tensors[kind, name], state.stored[kind, name].layout
        if layout.equals(node.placed, state.mesh):
            return held
        padding = self.paddings.get(name)
        if padding is not None and not layout.split_axes:
            held = padded(held, replace(state.stored[kind, name], padding=padding))
        if layout.split_axes or held.shape != node.placed.shape:
            raise PassError(
                f"`{name}` is held as `{layout}`, and this program wants `{node.placed}`",
                help="report this: a program for other inputs placed a weight elsewhere",
            )
        return shard(held, node.placed, state.mesh, state.coords)

    def run(self, arguments: Sequence[Tensor]) -> RankProgram:
        """One step: forward, backward where there is one, then what is still under way.

        `arguments` are the local parts of the inputs, in the program's order. Returns the outputs
        by label, in memory that no later step writes to; gradients are in the flat buffers. It
        counts when `commit` has been called; `undo` makes it as if it had not been.
        """
        self._kept = []
        saved: list[Any] = []
        reductions: tuple[Pending, ...] = ()
        outputs, _ = yield from self._graph(0, arguments, saved)
        if len(self.functions) > 1:
            self._kept = [(bucket, bucket.keep()) for bucket in self.buckets]
            _, reductions = yield from self._graph(1, arguments, saved)
        results: dict[str, Tensor] = {}
        for output, value in zip(self.outputs, outputs, strict=True):
            result = (yield from _arrived(value)) if type(value) is Pending else value
            label = output.label
            results[label] = result.clone() if label in self.held else result
        for reduction in reductions:
            yield from _arrived(reduction)
        return results

    def commit(self, results: dict[str, Tensor]) -> None:
        """Give the parameters their gradients, and take new values of buffers out of `results`."""
        kept, self._kept = self._kept, []
        for bucket, gradients in kept:
            bucket.give(gradients)
        for output in self.outputs:
            if output.kind is OutputKind.BUFFER:
                self.state.tensors["buffer", output.name].copy_(results.pop(output.label))

    def undo(self) -> None:
        """Put back the gradients that an unfinished step has overwritten."""
        kept, self._kept = self._kept, []
        for bucket, gradients in kept:
            bucket.put_back(gradients)

    def _graph(self, number: int, arguments: Sequence[Tensor], saved: list[Any]) -> RankProgram:
        """Run one graph; an operator that fails is named."""
        try:
            return (yield from self.functions[number](self.inputs[number](arguments), saved))
        except (ArithmeticError, IndexError, RuntimeError, TypeError, ValueError) as error:
            if isinstance(error, (MeshwrightError, torch.OutOfMemoryError)):
                raise
            raise operator_error(error, self.codes[number]) from error


def _arrived(pending: Pending) -> Generator[Any, Any, Tensor]:
    """Wait for a value, and put it where it belongs."""
    value: Tensor = yield Wait(pending.handle)
    if pending.into is not None and value is not pending.into:
        pending.into.copy_(value)
    return value


class _Inputs:
    """The values of a graph's inputs: all but the arguments are known beforehand.

    Weights that the graph does not use are left out: it has no say in how they are laid out.
    """

    def __init__(self, graph: Graph, step: RankStep, places: dict[str, int]) -> None:
        self.known: list[Any] = []
        self.arguments: list[tuple[int, int]] = []
        used = {n for node in graph.nodes for n in node.operands()}
        used |= graph.returned
        for i, node in enumerate(graph.inputs):
            if node.args[0] == "argument":
                self.known.append(None)
                self.arguments.append((i, places[node.args[1]]))
            else:
                self.known.append(step.tensor(node) if node in used else None)

    def __call__(self, arguments: Sequence[Tensor]) -> list[Tensor]:
        tensors = self.known.copy()
        for place, argument in self.arguments:
            tensors[place] = arguments[argument]
        return tensors


class _Bucket:
    """A flat buffer that a step overwrites, and the parameters whose gradients its views are."""

    def __init__(self, flat: Tensor, parameters: list[nn.Parameter], views: list[Tensor]) -> None:
        self.flat, self.pairs = flat, list(zip(parameters, views, strict=True))

    def keep(self) -> Kept:
        """Gradients to add to, safe from being overwritten: all as one buffer, or one by one."""
        gradients = [parameter.grad for parameter, _ in self.pairs]
        if not any(gradient is not None for gradient in gradients):
            return None
        pairs = zip(gradients, self.pairs, strict=True)
        if all(gradient is view for gradient, (_, view) in pairs):
            return self.flat.clone()
        return [
            (view, gradient.clone())
            for gradient, (_, view) in zip(gradients, self.pairs, strict=True)
            if gradient is not None
        ]

    def give(self, kept: Kept) -> None:
        """Add what was kept, and let the parameters have their gradients."""
        if isinstance(kept, Tensor):
            self.flat.add_(kept)
            return
        for view, gradient in kept or ():
            view.add_(gradient)
        for parameter, view in self.pairs:
            parameter.grad = view

    def put_back(self, kept: Kept) -> None:
        """Let the buffer hold what it held at `keep`; gradients elsewhere were not touched."""
        if isinstance(kept, Tensor):
            self.flat.copy_(kept)
            return
        for view, gradient in kept or ():
            view.copy_(gradient)


def padded(value: Tensor, stored: Stored) -> Tensor:
    """A global tensor with the zeros that its storage adds."""
    if stored.padding is None:
        return value
    shape = list(value.shape)
    shape[stored.padding.dim] = stored.padding.padded - stored.padding.size
    return torch.cat([value, value.new_zeros(shape)], stored.padding.dim)


def _owners(program: Program) -> dict[str, tuple[tuple[str, ...], Node]]:
    """By bucket node: the parameters whose gradients it holds, in order, and the node."""
    graph = program.step.backward
    if graph is None:
        return {}
    names: dict[tuple[str, int], str] = {}
    for gradient in graph.outputs_of(OutputKind.GRADIENT):
        source: Node = gradient.node.args[0]
        bucket = source if source.op == MeshOp("bucket") else source.args[0]
        names[bucket.name, gradient.node.args[1]] = gradient.name
    return {
        name: (tuple(names[name, i] for i in range(len(node.args))), node)
        for name, node in program.buckets().items()
    }


def _indexed(device: torch.device) -> torch.device:
    """The device with its number, so that it equals that of the tensors on it."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device

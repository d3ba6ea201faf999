"""Differentiate a placed graph, operator by operator, into explicit backward nodes.

A value's cotangent has the dual layout: split and replicated are their own duals, partial and
varying are each other's. So the adjoint of a collective follows from its type, and every backward
node is placed by the same rules as the forward.

Cotangents start at the loss, where they are 1, and at the values that a stage sends to others,
where they are inputs. An activation is a value that is computed from an argument or from what
another stage has sent; a cast of a parameter is not one. Nodes of the backward on which no
cotangent of an activation depends compute gradients of parameters: they are the weight phase.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch

from meshwright.compiler.autodiff.adjoints import cotangents
from meshwright.compiler.autodiff.vjp import VjpContext
from meshwright.compiler.graph.ir import (
    GETITEM,
    INPUT,
    Builder,
    Graph,
    InputKind,
    MeshOp,
    Node,
    Origin,
    Output,
    OutputKind,
    Phase,
)
from meshwright.compiler.layout.layout import Layout
from meshwright.compiler.placing.emit import Emitter
from meshwright.compiler.placing.movement import Movement

aten = torch.ops.aten


def differentiate(
    graph: Graph,
    written: frozenset[Node] = frozenset(),
    *,
    seeds: Iterable[Output] | None = None,
    scaled: bool = False,
    device: str = "cpu",
) -> tuple[Graph, tuple[Movement, ...]]:
    """The joint graph, and the changes of layout that operators of the backward asked for.

    The joint graph has the nodes of `graph`, then its backward. It has one more output for each
    input that the seeds depend on and that wants a gradient: a `GRADIENT` for a parameter, a
    `COTANGENT` for any other. `seeds` are the outputs that are differentiated: by default the loss
    and each differentiable value that is sent. The cotangent of a loss is 1; that of any other
    output is an input of the joint graph, a `COTANGENT` under the output's name. `written` are the
    inputs that the plan laid out. Where gradients are `scaled`, the cotangent of a loss is the loss
    scale of the run. `device` is the type of the ranks' devices.

    Requires: every node placed. Ensures: each gradient and cotangent has the dual of the layout of
    its value.
    """
    if seeds is None:
        given = graph.outputs_of(OutputKind.LOSS, OutputKind.SENT)
        seeds = [output for output in given if output.node.requires_grad]
    differentiator = _Differentiator(graph, written, scaled, device)
    return differentiator.run(seeds), tuple(differentiator.emitter.movements)


class _Differentiator:
    def __init__(self, graph: Graph, written: frozenset[Node], scaled: bool, device: str) -> None:
        self.graph, self.scaled = graph, scaled
        self.emitter = Emitter(
            Builder(graph.name, graph.mesh), backward=True, written=written, device=device
        )
        for node in graph.nodes:
            self.emitter.adopt(node)
        self.emitter.builder.phase = Phase.BACKWARD
        self.pending: dict[tuple[Node, int], list[Node]] = {}
        self.inner: set[Node] = set()
        """Cotangents of activations."""

    def run(self, seeds: Iterable[Output]) -> Graph:
        for output in seeds:
            self._seed(output)
        found: list[Output] = []
        for node in reversed(self.graph.nodes):
            if not node.requires_grad:
                continue
            if node.op == INPUT:
                if (node, 0) in self.pending:
                    trained = node.args[0] == InputKind.PARAMETER
                    kind = OutputKind.GRADIENT if trained else OutputKind.COTANGENT
                    found.append(Output(kind, node.args[1], self._cotangent(node, 0)))
            else:
                self._backward(node)
        return self._phased((*self.graph.outputs, *reversed(found)))

    def _seed(self, output: Output) -> None:
        node = output.node
        origin = replace(node.origin, forward=node.name)
        if output.kind is OutputKind.LOSS:
            kwargs = {"dtype": node.tensor.dtype}
            seed = self.emitter.call(
                aten.full.default, ((), 1.0), kwargs, origin=origin, name="seed"
            )
            if self.scaled:
                seed = self.emitter.call(MeshOp("loss_scale"), (seed,), {}, origin=origin)
        else:
            seed = self.emitter.builder.emit(
                INPUT,
                (InputKind.COTANGENT, output.name),
                type=node.type,
                layout=node.placed.dual(),
                origin=origin,
                name=f"{node.name}_cotangent",
            )
        self._add(node, 0, seed, origin)

    def _phased(self, outputs: tuple[Output, ...]) -> Graph:
        """The joint graph; nodes on which no cotangent of an activation depends are in the weight
        phase."""
        nodes = self.emitter.builder.nodes
        behind = set(self.inner)
        for node in reversed(nodes):
            if node in behind:
                behind.update(node.operands())
        builder = Builder(self.graph.name, self.graph.mesh)
        mapping = {node: node for node in nodes}
        for node in nodes:
            source = node.args[0] if node.op == GETITEM else node
            if node.phase is Phase.FORWARD or source in behind:
                builder.adopt(node)
            else:
                mapping[node] = builder.copy(node, mapping, phase=Phase.WEIGHT)
        return builder.graph(output.of(mapping[output.node]) for output in outputs)

    def _backward(self, node: Node) -> None:
        """Emit the backward of one node, if a cotangent has reached it."""
        origin = replace(node.origin, forward=node.name)
        if node.op == GETITEM:
            if (node, 0) in self.pending:
                self._add(node.args[0], node.args[1], self._cotangent(node, 0), origin)
            return
        num_results = len(node.type) if isinstance(node.type, tuple) else 1
        if not any((node, i) in self.pending for i in range(num_results)):
            return
        if node.op == MeshOp("all_gather_replicated"):
            self._scatter(node, origin)
            return
        grads = tuple(
            self._cotangent(node, i) if (node, i) in self.pending else None
            for i in range(num_results)
        )
        context = VjpContext(self.emitter, node, self._results(node), grads, origin)
        found = cotangents(context)
        for operand, grad in zip(context.operands, found, strict=True):
            if grad is not None and operand.requires_grad:
                self._add(operand, 0, grad, origin)

    def _scatter(self, node: Node, origin: Origin) -> None:
        """Scatter the cotangent of each user of a gathered value: a pending sum is not first
        reduced on all ranks and then cut."""
        for part in self.pending.pop((node, 0)):
            pending = part.args[0] if part.op == MeshOp("all_reduce") else part
            self._add(node.args[0], 0, pending, origin)

    def _results(self, node: Node) -> tuple[Node | None, ...]:
        """The nodes that hold a node's results: itself, or its items."""
        if not isinstance(node.type, tuple):
            return (node,)
        return tuple(
            None if type is None else self.emitter.item(node, i, node.origin)
            for i, type in enumerate(node.type)
        )

    def _add(self, value: Node, index: int, grad: Node, origin: Origin) -> None:
        layout = value.layout[index] if isinstance(value.layout, tuple) else value.layout
        assert isinstance(layout, Layout), value.name
        dual = self.emitter.reshard(grad, layout.dual(), origin)
        parts = self.pending.setdefault((value, index), [])
        parts.append(dual)
        if self.emitter.is_rooted(value) and value.op != MeshOp("all_gather_replicated"):
            # Of a parameter that many layers use, no more than one layer's share is there besides.
            # Those of activations wait: what is on its way between ranks has time to come.
            parts[:] = [self._sum(value, parts)]

    def _sum(self, value: Node, parts: Sequence[Node]) -> Node:
        origin = replace(value.origin, forward=value.name)
        total = parts[0]
        for part in parts[1:]:
            total = self.emitter.call(aten.add.Tensor, (total, part), origin=origin)
        return total

    def _cotangent(self, value: Node, index: int) -> Node:
        """The sum of the cotangents that a value has from its users."""
        total = self._sum(value, self.pending.pop((value, index)))
        if not self.emitter.is_rooted(value):
            self.inner.add(total)
        return total

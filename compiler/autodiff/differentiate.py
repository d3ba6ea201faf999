"""Differentiate a placed graph, operator by operator, into explicit backward nodes.

A value's cotangent has the dual layout: split and replicated are their own duals, partial and
varying are each other's. So the adjoint of a collective follows from its type, and every backward
node is placed by the same rules as the forward.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from meshwright.compiler.autodiff.adjoints import collective_adjoint
from meshwright.compiler.autodiff.vjp import VjpContext, cotangents
from meshwright.compiler.graph.ir import (
    GETITEM,
    INPUT,
    Builder,
    Graph,
    MeshOp,
    Node,
    Origin,
    Output,
    OutputKind,
    Phase,
)
from meshwright.compiler.layout.collectives import COLLECTIVES
from meshwright.compiler.layout.layout import Layout
from meshwright.compiler.placing.composite import Cotangents
from meshwright.compiler.placing.emit import Emitter, Movement

aten = torch.ops.aten


def differentiate(
    graph: Graph, explicit: frozenset[Node] = frozenset()
) -> tuple[Graph, tuple[Movement, ...]]:
    """The joint graph: the nodes of `graph`, then its backward; one `gradient:` output for each
    parameter that the loss depends on. And the changes of layout that operators of the backward
    asked for; `explicit` are the inputs that the plan laid out.

    Requires: a scalar output `loss`; every node placed. Ensures: each gradient has the dual layout
    of its parameter's.
    """
    differentiator = _Differentiator(graph, explicit)
    return differentiator.run(), tuple(differentiator.emitter.movements)


def node_cotangents(context: VjpContext) -> Cotangents:
    """Emit the backward of one node; the cotangent of each operand that wants one."""
    op = context.node.op
    if isinstance(op, MeshOp) and op.name in COLLECTIVES:
        return [collective_adjoint(context)]
    return cotangents(context)


class _Differentiator:
    def __init__(self, graph: Graph, explicit: frozenset[Node]) -> None:
        self.graph = graph
        self.emitter = Emitter(Builder(graph.name, graph.mesh), backward=True)
        for node in graph.nodes:
            self.emitter.adopt(node)
        self.emitter.builder.phase = Phase.BACKWARD
        self.emitter.explicit = set(explicit)
        self.pending: dict[tuple[Node, int], list[Node]] = {}

    def run(self) -> Graph:
        (loss,) = self.graph.outputs_of(OutputKind.LOSS)
        self._seed(loss.node)
        gradients: list[Output] = []
        for node in reversed(self.graph.nodes):
            if not node.requires_grad:
                continue
            if node.op == INPUT:
                if (node, 0) in self.pending:
                    cotangent = self._cotangent(node, 0)
                    gradients.append(Output(OutputKind.GRADIENT, node.args[1], cotangent))
            else:
                self._backward(node)
        return self.emitter.builder.graph((*self.graph.outputs, *reversed(gradients)))

    def _seed(self, loss: Node) -> None:
        origin = replace(loss.origin, forward=loss.name)
        one = self.emitter.call(
            aten.full.default, ((), 1.0), {"dtype": loss.tensor.dtype}, origin=origin, name="seed"
        )
        self._add(loss, 0, one, origin)

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
        found = node_cotangents(context)
        for operand, grad in zip(context.operands, found, strict=True):
            if grad is not None and operand.requires_grad:
                self._add(operand, 0, grad, origin)

    def _scatter(self, node: Node, origin: Origin) -> None:
        """Scatter what each user of a gathered value sent back: a sum is not reduced for all ranks
        to be cut afterwards."""
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
        self.pending.setdefault((value, index), []).append(dual)

    def _cotangent(self, value: Node, index: int) -> Node:
        """The sum of what a value's users sent back."""
        parts = self.pending.pop((value, index))
        origin = replace(value.origin, forward=value.name)
        total = parts[0]
        for part in parts[1:]:
            total = self.emitter.call(aten.add.Tensor, (total, part), origin=origin)
        return total

"""Separate the joint graph of a step into its forward and its backward.

Before:  linear: f32[8, 64@tp]             = linear(x, up_weight, up_bias)
         relu: f32[8, 64@tp]               = relu(linear)
         threshold_backward: f32[8, 64@tp] = threshold_backward(matmul, relu, 0)
After:   linear: f32[8, 64@tp]             = linear(x, up_weight, up_bias)
         relu: f32[8, 64@tp]               = relu(linear)
         relu: f32[8, 64@tp]               = saved(0)
         threshold_backward: f32[8, 64@tp] = threshold_backward(matmul, relu, 0)

What the backward takes from the forward is saved, but for what costs nothing to have again: views
of parameters, and gathers of stored-split parameters and of sequence-split inputs, of which the
shard is saved and gathered again. Saved values are handed over in the order in which the backward
pops them.
Requires: backward nodes name their forward node. Ensures: each saved value is popped once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from meshwright.compiler.graph.aliasing import storage
from meshwright.compiler.graph.ir import (
    INPUT,
    Builder,
    Graph,
    MeshOp,
    Node,
    Output,
    OutputKind,
    Phase,
)
from meshwright.compiler.graph.weights import input_behind
from meshwright.passes.statements.draft import Draft
from meshwright.passes.statements.sequence import gathers_again

aten = torch.ops.aten

SAVED = MeshOp("saved")
"""A value handed over by the forward; `args` is its number."""

_VIEWS = {
    aten.view.default,
    aten.t.default,
    aten.transpose.int,
    aten.permute.default,
    aten.unsqueeze.default,
    aten.slice.Tensor,
    aten._to_copy.default,
    MeshOp("vary"),
}
_GATHERS = {MeshOp("all_gather"), MeshOp("all_gather_replicated")}


def separate(draft: Draft) -> Draft:
    """`draft` with its forward and its backward apart; a graph without gradients is a forward."""
    graph = draft.graph
    if not graph.outputs_of(OutputKind.GRADIENT):
        return replace(draft, parts=(replace(graph, name="stage0.forward"),))
    regather = partial(gathers_again, draft.regions)
    return replace(draft, parts=separate_graph(graph, regather=regather))


def separate_graph(graph: Graph, *, regather: Callable[[Node], bool]) -> tuple[Graph, Graph]:
    """The forward and the backward of a joint graph.

    `regather` says of a gathered activation whether it is gathered again rather than kept.
    """
    return _Splitter(graph, regather).run()


def is_backward(node: Node) -> bool:
    """Whether a node of a joint graph belongs to the backward."""
    return node.phase is not Phase.FORWARD


class _Splitter:
    def __init__(self, graph: Graph, regather: Callable[[Node], bool]) -> None:
        self.graph, self.regather = graph, regather
        self.forward = Builder("stage0.forward", graph.mesh)
        self.backward = Builder("stage0.backward", graph.mesh)
        self.backward.phase = Phase.BACKWARD
        self.ahead: dict[Node, Node] = {}
        self.mapping: dict[Node, Node] = {}
        self.saved: dict[Node, Node] = {}
        self._cheap: dict[Node, bool] = {}

    def run(self) -> tuple[Graph, Graph]:
        for node in self.graph.nodes:
            if not is_backward(node):
                self.ahead[node] = self.forward.copy(node, self.ahead)
            if node.op == INPUT:
                self.mapping[node] = self.backward.copy(node, {})
        for node in self.graph.nodes:
            if is_backward(node):
                for operand in node.operands():
                    self._bring(operand)
                self.mapping[node] = self.backward.copy(node, self.mapping)
        self._overwrite_logits()
        return self._forward_graph(), self._backward_graph()

    def _bring(self, node: Node) -> None:
        """Make a forward value available in the backward: computed again, or saved."""
        if node in self.mapping:
            return
        if self._again(node):
            for operand in node.operands():
                self._bring(operand)
            self.mapping[node] = self.backward.copy(node, self.mapping)
        else:
            number = len(self.saved)
            self.saved[node] = self.mapping[node] = self.backward.emit(
                SAVED,
                (number,),
                type=node.type,
                layout=node.layout,
                origin=node.origin,
                name=node.name,
            )

    def _again(self, node: Node) -> bool:
        """Whether the backward computes a value again instead of saving it."""
        if node not in self._cheap:
            self._cheap[node] = (
                _is_weight(node)
                or (node.op in _GATHERS and self.regather(node))
                or (
                    node.op in _VIEWS
                    and all(n.op == INPUT or self._again(n) for n in node.operands())
                )
                or node.op == MeshOp("vary")
            )
        return self._cheap[node]

    def _overwrite_logits(self) -> None:
        """Let the loss write its gradient over the logits, where nothing else will read them."""
        readers = Counter(n for node in self.backward.nodes for n in set(node.operands()))
        kept = Counter(storage(node) for node in self.saved)
        kept.update({storage(node) for node in self.graph.returned})
        handed = {new: old for old, new in self.saved.items()}
        for node in self.backward.nodes:
            if node.op == MeshOp("cross_entropy_backward"):
                logits = node.args[1]
                if logits not in handed or readers[logits] > 1:
                    continue
                memory = storage(handed[logits])
                if memory.op != INPUT and kept[memory] == 1:
                    node.kwargs["overwrite"] = True

    def _forward_graph(self) -> Graph:
        results = [
            output.of(self.ahead[output.node])
            for output in self.graph.outputs
            if output.kind is not OutputKind.GRADIENT
        ]
        # The backward pops from the end, so what it needs first is saved last.
        kept = [
            Output(OutputKind.SAVED, str(i), self.ahead[node]) for i, node in enumerate(self.saved)
        ]
        return self.forward.graph((*results, *reversed(kept)))

    def _backward_graph(self) -> Graph:
        return self.backward.graph(
            gradient.of(self.mapping[gradient.node])
            for gradient in self.graph.outputs_of(OutputKind.GRADIENT)
        )


def _is_weight(node: Node) -> bool:
    """Whether a node brings a parameter or buffer to another layout."""
    source = input_behind(node)
    return source is not None and source is not node and source.args[0] != "argument"

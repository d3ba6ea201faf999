"""Store a vocabulary padded, and cut the padding off where its entries would be seen.

Before:  head_weight: f32[97, 16]        = input(parameter head.weight)
         linear: f32[8, 97]              = linear(embedding, head_weight)
         cross_entropy: (f32[8], f32[8]) = mesh::cross_entropy(linear, targets, None, -100,
             0.0, 97)
After:   head_weight: f32[98, 16]        = input(parameter head.weight)
         linear: f32[8, 98]              = linear(embedding, head_weight)
         cross_entropy: (f32[8], f32[8]) = mesh::cross_entropy(linear, targets, None, -100,
             0.0, 97)

Padded values flow through what treats each entry alone; the loss is told the true number of classes
and masks the rest; any other use gets the unpadded slice. So pad entries have zero gradient.
Requires: `paddings`. Ensures: no output and no reduction sees a pad entry.
Elsewhere: Megatron pads the vocabulary for good; DTensor splits unevenly.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from meshwright.compiler.composites.cross_entropy import CrossEntropy
from meshwright.compiler.composites.embedding import Embedding
from meshwright.compiler.graph.ir import (
    INPUT,
    Builder,
    Node,
    Op,
    TensorType,
    map_nodes,
)
from meshwright.compiler.placing.result_types import result_type
from meshwright.passes.statements.draft import Draft

aten = torch.ops.aten

_ELEMENTWISE = {
    aten._to_copy.default, aten.mul.Tensor, aten.div.Tensor, aten.tanh.default,
    aten.neg.default, aten.clone.default, aten.gelu.default, aten.detach.default,
}  # fmt: skip
"""Operators of one tensor (and numbers) that treat each entry alone."""

_PAIRWISE: dict[Op, float] = {
    aten.add.Tensor: 0.0, aten.sub.Tensor: 0.0, aten.mul.Tensor: 0.0, aten.div.Tensor: 1.0,
}  # fmt: skip
"""Operators of two tensors that treat each entry alone, and what pads the one that is not."""


def pad(draft: Draft) -> Draft:
    """The graph with every parameter of `draft.paddings` at its padded shape."""
    return _Padder(draft).run() if draft.paddings else draft


class _Padder:
    def __init__(self, draft: Draft) -> None:
        self.draft = draft
        self.builder = Builder(draft.graph.name, draft.mesh)
        self.mapping: dict[Node, Node] = {}
        self.padded: dict[Node, tuple[int, int]] = {}
        """New nodes with padding: the dim, and its true size."""
        self.cut: dict[Node, Node] = {}

    def run(self) -> Draft:
        for node in self.draft.graph.nodes:
            self.mapping[node] = self._node(node)
        outputs = tuple(
            output.of(self._true(self.mapping[output.node])) for output in self.draft.graph.outputs
        )
        values = {self.mapping[node]: pin for node, pin in self.draft.values.items()}
        entering = {
            self.mapping[node]: tuple((self.mapping[v], pin) for v, pin in pairs)
            for node, pairs in self.draft.entering.items()
        }
        graph = self.builder.graph(outputs)
        return replace(self.draft, graph=graph, values=values, entering=entering)

    def _node(self, node: Node) -> Node:
        if node.op == INPUT and node.args[1] in self.draft.paddings:
            padding = self.draft.paddings[node.args[1]]
            new = self._emit(node, node.args, _resized(node.tensor, padding.dim, padding.padded))
            self.padded[new] = (padding.dim, padding.size)
            return new
        if not any(self.mapping[n] in self.padded for n in node.operands()):
            return self.builder.copy(node, self.mapping)
        return self._through(node) or self._with_true_operands(node)

    def _through(self, node: Node) -> Node | None:
        """The node on padded operands, where pad entries stay apart from the others."""
        args = map_nodes(node.args, self.mapping.__getitem__)
        first = args[0]
        if node.op == Embedding.op and self.padded.get(first, (1,))[0] == 0:
            return self._emit(node, (*args, self.padded[first][1]), node.type)
        if node.op == CrossEntropy.op and self._pads(first) == len(first.tensor.shape) - 1:
            classes = (*args[1:2], *(self._true(w) if w else None for w in args[2:3]), *args[3:])
            return self._emit(node, (first, *classes), node.type)
        if node.op == aten.linear.default and self.padded.get(args[1], (1,))[0] == 0:
            return self._linear(node, args)
        if node.op == aten.view.default:
            return self._view(node, first)
        if node.op == aten.t.default or node.op == aten.transpose.int:
            return self._transposed(node, args)
        if node.op == aten.slice.Tensor and node.args[1] % len(first.tensor.shape) != self._pads(
            first
        ):
            return self._same_dim(node, args)
        others = list(node.operands())[1:]
        if node.op in _ELEMENTWISE and not others:
            return self._same_dim(node, args)
        if node.op in _PAIRWISE and len(others) == 1:
            return self._pairwise(node, args)
        return None

    def _pairwise(self, node: Node, args: tuple[Any, ...]) -> Node | None:
        """Two operands padded in the same dim, or one that is and one that is brought there."""
        first, second = args[:2]
        depths = {len(x.tensor.shape) - self._pads(x) for x in (first, second) if x in self.padded}
        if len(depths) > 1 or (node.op == aten.div.Tensor and second in self.padded):
            return None
        (depth,) = depths
        wide = first if first in self.padded else second
        rows, (_, size) = wide.tensor.shape[-depth], self.padded[wide]
        pair = [self._brought(node, x, depth, size, rows) for x in (first, second)]
        dim = len(node.tensor.shape) - depth
        new = self._emit(node, (*pair, *args[2:]), _resized(node.tensor, dim, rows))
        self.padded[new] = (dim, size)
        return new

    def _brought(self, node: Node, x: Node, depth: int, size: int, rows: int) -> Node:
        """`x` with `rows` entries in the dim that is `depth` from the end, where it has `size`."""
        shape = x.tensor.shape
        if x in self.padded or depth > len(shape) or shape[-depth] != size:
            return x
        widths = [0, 0] * (depth - 1) + [0, rows - size]
        padding = (x, widths, _PAIRWISE[node.op])
        return self._call(node, aten.constant_pad_nd.default, padding, x.requires_grad)

    def _linear(self, node: Node, args: tuple[Any, ...]) -> Node | None:
        """Padded rows of the weight give padded features; the bias is padded too, or made so."""
        x, weight, *bias = args
        if x in self.padded:
            x = self._true(x)
        rows = weight.tensor.shape[0]
        for i, each in enumerate(bias):
            if each is not None and each.tensor.shape[0] != rows:
                missing = rows - each.tensor.shape[0]
                bias[i] = self._call(node, aten.constant_pad_nd.default, (each, [0, missing], 0.0))
        type = _resized(node.tensor, len(node.tensor.shape) - 1, rows)
        new = self._emit(node, (x, weight, *bias), type)
        self.padded[new] = (len(type.shape) - 1, node.tensor.shape[-1])
        return new

    def _view(self, node: Node, first: Node) -> Node | None:
        """A view that leaves the padded dim, being the last, as it is."""
        dim, size = self.padded[first]
        last = len(first.tensor.shape) - 1
        shape = node.tensor.shape
        if dim != last or not shape or shape[-1] != size:
            return None
        full = first.tensor.shape[-1]
        new = self._emit(
            node, (first, (*shape[:-1], full)), _resized(node.tensor, len(shape) - 1, full)
        )
        self.padded[new] = (len(shape) - 1, size)
        return new

    def _transposed(self, node: Node, args: tuple[Any, ...]) -> Node:
        first = args[0]
        dim, size = self.padded[first]
        ndim = len(first.tensor.shape)
        a, b = (0, 1) if node.op == aten.t.default else (args[1] % ndim, args[2] % ndim)
        moved = {a: b, b: a}.get(dim, dim)
        new = self._emit(node, args, _resized(node.tensor, moved, first.tensor.shape[dim]))
        self.padded[new] = (moved, size)
        return new

    def _same_dim(self, node: Node, args: tuple[Any, ...]) -> Node:
        dim, size = self.padded[args[0]]
        new = self._emit(node, args, _resized(node.tensor, dim, args[0].tensor.shape[dim]))
        self.padded[new] = (dim, size)
        return new

    def _with_true_operands(self, node: Node) -> Node:
        """The node as the model wrote it, on operands with their padding cut off."""
        true = {n: self._true(self.mapping[n]) for n in node.operands()}
        return self.builder.copy(node, true)

    def _true(self, node: Node) -> Node:
        if node not in self.padded:
            return node
        if node not in self.cut:
            dim, size = self.padded[node]
            self.cut[node] = self._call(node, aten.slice.Tensor, (node, dim, 0, size))
        return self.cut[node]

    def _pads(self, node: Node) -> int:
        return self.padded.get(node, (-1, 0))[0]

    def _emit(self, node: Node, args: tuple[Any, ...], type: Any) -> Node:
        return self.builder.emit(
            node.op,
            args,
            {k: map_nodes(v, self.mapping.__getitem__) for k, v in node.kwargs.items()},
            type=type,
            origin=node.origin,
            requires_grad=node.requires_grad,
            name=node.name,
        )

    def _call(
        self, node: Node, op: Any, args: tuple[Any, ...], requires_grad: bool | None = None
    ) -> Node:
        return self.builder.emit(
            op,
            args,
            type=result_type(op, args, {}),
            origin=node.origin,
            requires_grad=node.requires_grad if requires_grad is None else requires_grad,
        )


def _resized(type: TensorType, dim: int, size: int) -> TensorType:
    return TensorType((*type.shape[:dim], size, *type.shape[dim + 1 :]), type.dtype)

"""The tools that rewrites of operators are written with, and the table of `normalise`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from meshwright.compiler.composites.random import Random
from meshwright.compiler.graph.ir import (
    Arg,
    Builder,
    Graph,
    MeshOp,
    Node,
    NodeType,
    Op,
    Origin,
    TensorType,
    map_nodes,
    nodes_in,
    rewrite,
)
from meshwright.compiler.placing.result_types import result_type

aten = torch.ops.aten


class Rewriter:
    """The node that a rewrite replaces, and a builder for the new ones."""

    def __init__(self, builder: Builder) -> None:
        self.builder = builder
        self.num_random = 0
        self.items: dict[Node, tuple[Node, ...]] = {}
        """By replaced node with multiple results: what stands for each result."""

    def begin(self, node: Node, mapping: Mapping[Node, Node]) -> None:
        """Turn to the next node to be replaced; `mapping` gives what stands for those before."""
        self.node = node
        self.args = map_nodes(node.args, mapping.__getitem__)
        self.kwargs = {k: map_nodes(v, mapping.__getitem__) for k, v in node.kwargs.items()}

    def option(self, position: int, name: str, default: Arg = None) -> Arg:
        """An argument given by position or by name."""
        if position < len(self.args):
            return self.args[position]
        return self.kwargs.get(name, default)

    def call(self, op: Op, *args: Arg, type: NodeType = None, **kwargs: Arg) -> Node:
        """Emit a node in place of the current one."""
        return emit_for(self.node, self.builder, op, args, kwargs, type=type)

    def view(self, x: Node, shape: tuple[int, ...]) -> Node:
        """`x` in another shape, which may be `(-1,)`; itself where it has that shape."""
        if shape == (-1,):
            shape = (math.prod(x.tensor.shape),)
        return x if x.tensor.shape == shape else self.call(aten.view.default, x, list(shape))

    def stopped(self, x: Arg) -> Arg:
        """The same values without a gradient; numbers are left as they are."""
        if not isinstance(x, Node) or not x.requires_grad:
            return x
        return self._emit(aten.detach.default, (x,), x.type)

    def draw(
        self, kind: str, like: Node | None, shape: tuple[int, ...], dtype: torch.dtype
    ) -> Node:
        """Emit random numbers of this kind, laid out as `like` where it is given."""
        args = (like, shape, kind, dtype, self.random_id())
        return self._emit(Random.op, args, TensorType(shape, dtype))

    def _emit(self, op: Op, args: tuple[Arg, ...], type: NodeType) -> Node:
        return self.builder.emit(op, args, type=type, origin=self.node.origin)

    def random_id(self) -> int:
        """A number for an operator that draws random numbers: its place among them in the model."""
        self.num_random += 1
        return self.num_random


def emit_for(
    node: Node,
    builder: Builder,
    op: Op,
    args: tuple[Arg, ...],
    kwargs: dict[str, Arg] | None = None,
    *,
    type: NodeType = None,
    name: str = "",
    origin: Origin | None = None,
) -> Node:
    """Emit a call that does a part of what `node` does: it has its origin, unless another is given,
    and a gradient if the node and an operand do."""
    kwargs = kwargs or {}
    type = type or result_type(op, args, kwargs)
    types = type if isinstance(type, tuple) else (type,)
    return builder.emit(
        op,
        args,
        kwargs,
        type=type,
        origin=origin or node.origin,
        requires_grad=node.requires_grad
        and any(each is not None and each.differentiable for each in types)
        and any(operand.requires_grad for operand in nodes_in((args, *kwargs.values()))),
        name=name,
    )


Rewrite = Callable[[Rewriter], "Node | None"]
REWRITES: dict[Any, Rewrite] = {}
"""By operator, or by name where a library registers it; one that returns None changes nothing."""


def rewrites(*ops: Any) -> Callable[[Rewrite], Rewrite]:
    """Register the rewrite of these operators."""

    def register(function: Rewrite) -> Rewrite:
        for op in ops:
            REWRITES[op] = function
        return function

    return register


def rewrite_operators(
    graph: Graph, table: Mapping[Any, Rewrite], *, unchanged: Callable[[Node], None] | None = None
) -> Graph:
    """The graph with each operator of a table replaced; `unchanged` is shown every other node."""
    rewriter = Rewriter(Builder(graph.name, graph.mesh))

    def replaced(_: Builder, node: Node, mapping: Mapping[Node, Node]) -> Node | None:
        rewriter.begin(node, mapping)
        found = table.get(node.op) or table.get(_library_name(node.op))
        replacement = found(rewriter) if found else None
        if replacement is None and unchanged is not None:
            unchanged(node)
        return replacement

    return rewrite(graph, replaced, builder=rewriter.builder)


def _library_name(op: Op) -> str:
    """The name of an operator that a library registers when it is imported."""
    return str(op) if isinstance(op, MeshOp) else op._schema.name


def to_dtype(rewriter: Rewriter, x: Node, dtype: torch.dtype) -> Node:
    if x.tensor.dtype == dtype:
        return x
    return rewriter.call(aten._to_copy.default, x, dtype=dtype)

"""Add up gradients in float32, and reduce them over ranks in the type that the plan names.

Before:  mm: bf16[64, 16] partial(dp) = mm(t, view)
         all_reduce: bf16[64, 16]     = all_reduce(mm, dp)
         to_copy: f32[64, 16]         = to_copy(all_reduce, dtype=f32)
After:   mm: bf16[64, 16] partial(dp)     = mm(t, view)
         to_copy: f32[64, 16] partial(dp) = to_copy(mm, dtype=f32)
         all_reduce: f32[64, 16]          = all_reduce(to_copy, dp)

A product of 16 bits is a sum in float32 that was rounded once. Where more is added to it (other
microbatches, other uses of the weight, other ranks) each sum would be rounded again, and small
terms lost. With `reduce=bf16` ranks send half of the bytes and add up what was rounded.
Requires: a placed joint graph. Ensures: gradients of float32, or of the model's wider type.
Elsewhere: FSDP2's `reduce_dtype`, Megatron's main gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from meshwright.compiler.composites.embedding import EmbeddingBackward
from meshwright.compiler.graph.ir import (
    TRANSFER,
    Builder,
    Graph,
    Node,
    Output,
    OutputKind,
    rewrite,
)
from meshwright.compiler.graph.transfers import collective_kind, combines
from meshwright.compiler.layout.wires import HALF_TYPES
from meshwright.dsl.statements import Precision
from meshwright.passes.statements.draft import Draft

aten = torch.ops.aten

_CAST = aten._to_copy.default
_CARRIERS = {
    aten.add.Tensor, aten.slice.Tensor, aten.constant_pad_nd.default, aten.view.default,
    aten.t.default, aten.transpose.int, aten.permute.default, EmbeddingBackward.op,
}  # fmt: skip
"""Operators that add up or move gradients, besides collectives: a cast may as well come before."""


def widen(draft: Draft) -> Draft:
    """`draft` with its gradients added up in float32."""
    statement = next(iter(draft.plan.of(Precision)), None)
    if statement is None or not draft.graph.outputs_of(OutputKind.GRADIENT):
        return draft
    return replace(draft, graph=_Widener(draft.graph, statement.reduce == "bf16").run())


class _Widener:
    def __init__(self, graph: Graph, narrow: bool) -> None:
        self.graph, self.mesh, self.narrow = graph, graph.mesh, narrow
        self.gradients = {each.node for each in graph.outputs_of(OutputKind.GRADIENT)}
        self.leading = self._leading()
        self.wide = self._wide()

    def run(self) -> Graph:
        self.builder = Builder(self.graph.name, self.mesh)
        return rewrite(self.graph, self._typed, builder=self.builder, output=self._returned)

    def _leading(self) -> set[Node]:
        """What only leads gradients to where they are kept."""
        users, found = self.graph.users(), set[Node]()
        for node in reversed(self.graph.nodes):
            alone = found.issuperset(users[node]) and (users[node] or node in self.gradients)
            if alone and (node.op == _CAST or _carries(node)):
                found.add(node)
        return found

    def _wide(self) -> set[Node]:
        """The nodes that compute in float32 what they would in 16 bits."""
        found = {n for n in self.gradients & self.leading if _is_narrow(n) and self._widens(n)}
        for node in reversed(self.graph.nodes):
            cast = node.op == _CAST and node in self.leading and not _is_narrow(node)
            # Of a table, the rows are added up in float32, and what comes before stays narrow.
            if cast or (node in found and node.op != EmbeddingBackward.op):
                found.update(n for n in node.operands() if _is_narrow(n) and self._widens(n))
        return found

    def _widens(self, node: Node) -> bool:
        sent = self.narrow and self._is_sent(node)
        return node in self.leading and node.op != _CAST and not sent

    def _is_sent(self, node: Node) -> bool:
        """Whether ranks reduce the shares of a gradient there."""
        kind = collective_kind(node.op)
        reduces = kind is not None and kind.moves and kind.source == "partial"
        return reduces and not combines(node, self.mesh)

    def _typed(self, _: Builder, node: Node, mapping: Mapping[Node, Node]) -> Node | None:
        if node.op == _CAST and node.args[0] in self.wide:
            return mapping[node.args[0]]
        if node not in self.leading:
            return None
        if node in self.wide:
            return self._in(torch.float32, node, mapping)
        if _is_narrow(node) and combines(node, self.mesh):
            return self._cast(self._in(torch.float32, node, mapping), node.tensor.dtype)
        if self.narrow and self._is_sent(node) and node.tensor.dtype == torch.float32:
            return self._cast(self._in(torch.bfloat16, node, mapping), torch.float32)
        return None

    def _in(self, dtype: torch.dtype, node: Node, mapping: Mapping[Node, Node]) -> Node:
        """The node computed in another type."""

        def operand(value: Node) -> Node:
            new = mapping[value]
            return self._cast(new, dtype) if new.tensor.dtype.is_floating_point else new

        return self.builder.copy(node, operand, type=replace(node.tensor, dtype=dtype))

    def _cast(self, value: Node, dtype: torch.dtype) -> Node:
        if value.tensor.dtype == dtype:
            return value
        return self.builder.emit(
            _CAST,
            (value,),
            {"dtype": dtype},
            type=replace(value.tensor, dtype=dtype),
            layout=value.placed,
            origin=value.origin,
            phase=value.phase,
        )

    def _returned(self, output: Output, node: Node) -> Node:
        narrow = output.kind is OutputKind.GRADIENT and _is_narrow(node)
        return self._cast(node, torch.float32) if narrow else node


def _carries(node: Node) -> bool:
    return node.op in (*_CARRIERS, TRANSFER) or collective_kind(node.op) is not None


def _is_narrow(node: Node) -> bool:
    return node.tensor.dtype in HALF_TYPES

"""Decide what runs once, and what for each coordinate of a sequential axis.

Before:  ne: bool[8@micro]                    = ne(targets, -100)
         sum_1: i64[] partial(micro)          = sum(ne)
         all_reduce: i64[]                    = all_reduce(sum_1, micro)
         div: f32[] partial(micro)            = div(sum, to_copy)
         all_reduce_1: f32[]                  = all_reduce(div, micro)
After:   the same nodes; `ne` and `sum_1` are also counted beforehand, `all_reduce` runs before the
         loop, `div` in it, and `all_reduce_1` after it

A value that is split or partial over the axis runs in the loop; what does not depend on the axis
runs once before, and what depends on a sum or a concatenation over it once after. So reducing over
the axis is accumulation, and nothing moves. A sum that the loop itself needs whole, such as a
number of labels, is counted in a loop of its own before, unless it depends on parameters.
Requires: a placed joint graph. Ensures: nodes take no value of a later phase, and values of a loop
leave it through a reduction or a gather over the sequential axis.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch

from meshwright.compiler.errors import LayoutError
from meshwright.compiler.graph.ir import (
    INPUT,
    TRANSFER,
    Builder,
    Graph,
    Node,
    OutputKind,
    Phase,
    rewrite,
)
from meshwright.compiler.graph.text import op_text
from meshwright.compiler.graph.transfers import collective_kind, combines
from meshwright.compiler.layout.mesh import Mesh
from meshwright.passes.statements.draft import Draft
from meshwright.passes.statements.pins import module_text

aten = torch.ops.aten

_BETWEEN = (aten._to_copy.default, aten.add.Tensor, TRANSFER)
"""What may be between the reductions of a gradient: casts, and sums over stages."""


def part_axes(graph: Graph) -> Graph:
    """The graph with each collective along both sequential and other axes made into two: the first
    along the sequential axes, so that the second runs once."""
    if not graph.mesh.sequential:
        return graph
    return rewrite(graph, _apart)


def sum_first(draft: Draft) -> Draft:
    """`draft` with each gradient summed up over microbatches before ranks reduce or scatter it, but
    where they keep no whole gradient: there they scatter each microbatch's, and sum up parts."""
    if not draft.mesh.sequential:
        return draft
    gradients = draft.graph.outputs_of(OutputKind.GRADIENT)
    scattered = [each.node for each in gradients if draft.zero.get(each.name, 0) > 1]
    apart = {node for gradient in scattered for node in _reductions(gradient)}

    def swapped(builder: Builder, node: Node, mapping: Mapping[Node, Node]) -> Node | None:
        if node in apart or not (combines(node, draft.mesh) and _sums(node)):
            return None
        over_ranks: Node = node.args[0]
        if not _sums(over_ranks):
            return None
        value = mapping[over_ranks.args[0]]
        layout = value.placed.drop_partial(node.kwargs["axes"]).canonical(draft.mesh)
        first = builder.copy(node, mapping, args=(value,), layout=layout)
        return builder.copy(over_ranks, mapping, args=(first,), layout=node.placed)

    return replace(draft, graph=rewrite(draft.graph, swapped))


def _reductions(node: Node) -> Iterator[Node]:
    """The collectives that a value comes from, from the last to the first, with casts, transfers
    and sums that are between."""
    if collective_kind(node.op) is not None or node.op in _BETWEEN:
        yield node
        for operand in node.operands():
            yield from _reductions(operand)


def _sums(node: Node) -> bool:
    """Whether a node adds up the shares of a pending sum, wherever the result goes."""
    kind = collective_kind(node.op)
    return (
        kind is not None
        and kind.moves
        and kind.source == "partial"
        and node.args[0].placed.reduction == "sum"
    )


def _apart(builder: Builder, node: Node, mapping: Mapping[Node, Node]) -> Node | None:
    mesh, kind = builder.mesh, collective_kind(node.op)
    if kind is None or not kind.moves:
        return None
    axes = node.kwargs["axes"]
    sequential = tuple(axis for axis in axes if axis in mesh.sequential)
    rest = tuple(axis for axis in axes if axis not in mesh.sequential)
    if sequential and not kind.combines:
        raise _not_in_a_loop(node, sequential[0], "moves values between the turns of")
    if not sequential or not rest:
        return None
    layout = mapping[node.args[0]].placed.drop_partial(sequential).drop_split(sequential, mesh)
    if kind.target == "varying":
        layout = layout.add_varying(sequential)
    layout = layout.canonical(mesh)
    first = builder.copy(node, mapping, kwargs={"axes": sequential}, layout=layout)
    return builder.copy(node, mapping, args=(first,), kwargs={"axes": rest})


def loop(graph: Graph) -> Graph:
    """The graph with the phase of each node set to when it runs."""
    return _Looper(graph).run() if graph.mesh.sequential else graph


class _Looper:
    def __init__(self, graph: Graph) -> None:
        self.graph, self.mesh = graph, graph.mesh
        self.counted = self._needed_whole()
        """The reductions over the axis whose results the loop needs, and what stands between."""
        self.counting: set[Node] = set()
        """The nodes that compute the operands of these reductions in a loop of their own."""
        for node in graph.nodes:
            if node in self.counted and combines(node, self.mesh):
                self._count(node)
        self.phases: dict[Node, Phase] = {}
        for node in graph.nodes:
            self.phases[node] = self._phase(node)

    def run(self) -> Graph:
        counts: dict[Node, Node] = {}

        def placed(builder: Builder, node: Node, mapping: Mapping[Node, Node]) -> Node:
            phase = self.phases[node]
            if node.op == INPUT:
                counts[node] = builder.copy(node, {})
                return counts[node]
            if node in self.counting:
                counts[node] = builder.copy(node, counts, phase=Phase.COUNT)
            counted = node in self.counted and combines(node, self.mesh)
            return builder.copy(node, counts if counted else mapping, phase=phase)

        return rewrite(self.graph, placed)

    def _phase(self, node: Node) -> Phase:
        if in_loop(node, self.mesh):
            return node.phase
        after = combines(node, self.mesh) and node not in self.counted
        # The gradient of a weight that no microbatch changes goes back with those that they do.
        back = node.op == TRANSFER and node.phase is Phase.WEIGHT
        if after or back or any(self.phases[n] is Phase.AFTER for n in node.operands()):
            return Phase.AFTER
        if not combines(node, self.mesh) and any(map(self._in_turn, node.operands())):
            return node.phase
        # Stages go before the loop one after another, so that the cotangent of an activation
        # cannot go back there.
        return node.phase if node.op == TRANSFER and node.phase is Phase.BACKWARD else Phase.BEFORE

    def _in_turn(self, node: Node) -> bool:
        """Whether a node runs in every turn, though its values may be the same in all: it may take
        only the type of what differs, as zeros like it."""
        return not self.phases[node].once

    def _needed_whole(self) -> set[Node]:
        """The reductions over the axis that a node of the loop takes, and what stands between."""
        reduced: set[Node] = set()
        for node in self.graph.nodes:
            if combines(node, self.mesh) or any(
                n in reduced and not in_loop(n, self.mesh) for n in node.operands()
            ):
                reduced.add(node)
        wanted: set[Node] = set()
        for node in self.graph.nodes:
            if in_loop(node, self.mesh):
                wanted.update(self._behind(node, reduced))
        return wanted

    def _behind(self, node: Node, reduced: set[Node]) -> set[Node]:
        """The reductions outside of the loop that a node depends on, and what leads to them."""
        found: set[Node] = set()
        pending = [n for n in node.operands() if not in_loop(n, self.mesh)]
        while pending:
            each = pending.pop()
            if each in reduced and each not in found:
                found.add(each)
                if not combines(each, self.mesh):
                    pending += each.operands()
        return found

    def _count(self, node: Node) -> None:
        """Note what computes a sum before the loop; raises `LayoutError` for a parameter there."""
        pending = [node.args[0]]
        while pending:
            each = pending.pop()
            if each in self.counting:
                continue
            if combines(each, self.mesh) or (each.op == INPUT and each.args[0] == "parameter"):
                what = "depends on parameters, and is needed whole in"
                raise _not_in_a_loop(node.args[0], node.kwargs["axes"][0], what)
            self.counting.add(each)
            pending += each.operands()


def in_loop(node: Node, mesh: Mesh) -> bool:
    """Whether the values of a node differ between coordinates of a sequential axis."""
    return any(
        axis in mesh.sequential
        for layout in node.layouts
        for axis in (*layout.split_axes, *layout.partial_axes)
    )


def _not_in_a_loop(node: Node, axis: str, what: str) -> LayoutError:
    while node.op == TRANSFER:  # what the model computes is the value that is sent
        node = node.args[0]
    return LayoutError(
        f"`{op_text(node.op)}` in {module_text(node.origin.module)} {what} the loop over `{axis}`",
        code="not-in-a-loop",
        culprit=f"{node.name} {node.origin.source}".strip(),
        help="run the whole batch at once: leave `accumulate` and `microbatches=` out of the plan",
    )

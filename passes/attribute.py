"""Name the line of the plan behind every input that it lays out and every collective.

Before:  w: f32[16, 64@tp] = input(parameter down.weight)
         y: f32[8, 16] partial(tp) = linear(x, w)
         y1: f32[8, 16] = all_reduce(y, tp)
After:   the same nodes; the origin of each says `gpt.plan:5`, where `rows down over tp` stands

A collective of the forward has the line that was noted where it was put in, and an adjoint that of
the collective in the forward. Any other has the line of what it moves: a value is split, partial or
varying over an axis because of an operand that is, weights before activations.
Requires: a graph that no later pass adds collectives to. Ensures: only `plan_line` has changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from meshwright.compiler.graph.aliasing import has_no_memory
from meshwright.compiler.graph.ir import INPUT, Builder, Node, Phase, rewrite
from meshwright.compiler.graph.transfers import is_collective
from meshwright.passes.statements.draft import Draft, input_key
from meshwright.passes.statements.pins import axis_lines, pin_lines


def attribute(draft: Draft) -> Draft:
    """`draft` with `plan_line` set on inputs, on what pinned weights feed and on collectives."""
    lines = _Lines(draft).found

    def attributed(builder: Builder, node: Node, mapping: Mapping[Node, Node]) -> Node | None:
        if node not in lines:
            return None
        return builder.copy(node, mapping, origin=replace(node.origin, plan_line=lines[node]))

    return replace(draft, graph=rewrite(draft.graph, attributed))


class _Lines:
    """Lines of the plan: `found` by node, `axes` by node and axis that it is not replicated on, and
    `weights` by parameter, after any collectives and views too."""

    def __init__(self, draft: Draft) -> None:
        self.draft, graph = draft, draft.graph
        self.found: dict[Node, str] = {}
        self.axes: dict[Node, dict[str, str]] = {}
        self.forward: dict[str, Node] = {}
        self.weights: dict[Node, str] = {}
        for node in graph.nodes:
            self._visit(node)
        for node in filter(is_collective, graph.nodes):
            self._name(node)

    def _visit(self, node: Node) -> None:
        self.forward.setdefault(node.name, node)
        self.axes[node] = {}
        if node.op == INPUT:
            self._input(node)
            return
        operands = sorted(dict.fromkeys(node.operands()), key=lambda n: n not in self.weights)
        for axis in _axes_used(node):
            # The line behind a gather does not explain what the gathered value is combined with.
            lines = (self.axes[n].get(axis) for n in operands if axis in _axes_used(n))
            line = next(filter(None, lines), "")
            if line:
                self.axes[node][axis] = line
        if is_collective(node):
            self.axes[node].update(self._asked(node))
        if operands and operands[0] in self.weights and _keeps(node):
            self.weights[node] = self.weights[operands[0]]
        elif line := _joined(self.weights.get(n, "") for n in operands):
            self.found[node] = line

    def _input(self, node: Node) -> None:
        key = input_key(node)
        used, stored = self.draft.inputs.get(key), self.draft.stored.get(key)
        if line := _joined(map(pin_lines, (used, stored))):
            self.found[node] = line
        if used and node.of_model:
            self.weights[node] = pin_lines(used)
        for pin in filter(None, (stored, used)):
            self.axes[node].update(axis_lines(pin))

    def _asked(self, node: Node) -> dict[str, str]:
        """By axis, the line of a collective that does not follow from what it moves: that noted
        where it was put in, or that of whose adjoint it is."""
        axes: tuple[str, ...] = node.kwargs["axes"]
        backward = node.phase is not Phase.FORWARD
        other = self.forward.get(node.origin.forward) if backward else None
        if other is not None and is_collective(other):
            found = {**self.axes[other.args[0]], **self.axes[other]}
            return {axis: found[axis] for axis in axes if found.get(axis)}
        if backward:
            return {}
        every = dict.fromkeys(axes, node.origin.plan_line) if node.origin.plan_line else {}
        return {**every, **dict(node.origin.axis_lines)}

    def _name(self, node: Node) -> None:
        found = {**self.axes[node.args[0]], **self.axes[node]}
        line = _joined(found.get(axis, "") for axis in node.kwargs["axes"])
        if line:
            self.found[node] = line


def _keeps(node: Node) -> bool:
    """Whether a weight is the same weight after this node."""
    return is_collective(node) or has_no_memory(node.op)


def _axes_used(node: Node) -> Iterable[str]:
    return dict.fromkeys(axis for layout in node.layouts for axis in layout.axes_used)


def _joined(lines: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(filter(None, lines)))

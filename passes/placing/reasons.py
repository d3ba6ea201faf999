"""Why values change their layouts: the lines of the plan behind it, and what the next best choice
would cost.

A call uses an axis because of an operand that stays split over it, partial or varying: weights come
before activations. Where no operand does, a layout flowed back, and the reason is what takes the
result. So lines follow the layouts: forward, back, and forward to what is left.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

from meshwright.compiler.graph.ir import GETITEM, INPUT, Node
from meshwright.compiler.graph.slots import call_operands
from meshwright.compiler.graph.text import op_text, size_text
from meshwright.compiler.layout.layout import Layout
from meshwright.compiler.layout.reshard import Collective
from meshwright.compiler.placing.choose import Choice
from meshwright.compiler.placing.pricing import sent_more
from meshwright.passes.placing.moves import Marked
from meshwright.passes.placing.written import VIEWS
from meshwright.passes.statements.draft import Draft, input_key
from meshwright.passes.statements.pins import axis_lines


class Reasons:
    """The reasons for what a choice moves in a marked graph."""

    def __init__(self, draft: Draft, marked: Marked, choice: Choice) -> None:
        self.draft, self.marked, self.choice = draft, marked, choice
        self.lines: dict[Node, dict[str, str]] = {}
        """By node, and axis that it uses: the line of the plan behind it, where one is known."""
        self._weights: set[Node] = set()
        """Parameters, buffers and their views."""
        self._by_weight: set[tuple[Node, str]] = set()
        """The axes that a node uses because of a weight."""
        nodes, users = marked.graph.nodes, marked.graph.users()
        for node in nodes:
            self.lines[node] = {}
            self._follow(node)
        for node in reversed(nodes):
            self._lead(node, users[node])
        for node in nodes:
            self._follow(node)

    def behind(
        self, collective: Collective, value: Node, user: Node | None
    ) -> tuple[tuple[str, str], ...]:
        """The lines behind a collective, by axis: of the layout, where the plan wrote one; of what
        takes the value, over axes that come to split it or that it was whole over; of the value
        over others, and where a split moves for no weight."""
        axes, found = collective.axes, dict(self.lines[value])
        move = self.marked.move(user) if user else None
        if move and move.line:
            found = dict.fromkeys(axes, move.line)
        elif user:
            source, target = collective.source, collective.target
            for axis, line in self.lines[user].items():
                first = source.state(axis) != "split" or (user, axis) in self._by_weight
                if source.state(axis) == "replicated" or (target.state(axis) == "split" and first):
                    found[axis] = line
        return tuple((axis, found[axis]) for axis in axes if found.get(axis))

    def instead(self, user: Node) -> str:
        """What the next best placement of a call would cost, all others being as they are."""
        found = self.choice.next_best(user)
        if found is None:
            return "there is no other way"
        placement, cost = found
        operands = ", ".join(str(each.drop_varying()) for each in placement.operands)
        return f"`{op_text(user.op)}` of {operands} {_more(cost)}"

    def _follow(self, node: Node) -> None:
        """Give a node the lines of its operands."""
        lines = self.lines[node]
        if node.of_model if node.op == INPUT else self._is_view_of_weight(node):
            self._weights.add(node)
        if node.op == INPUT:
            pin = self.draft.inputs.get(input_key(node))
            lines.update(axis_lines(pin))
        elif node.op == GETITEM:
            lines.update(self.lines[node.args[0]])
        else:
            for value, needed in self._needs(node):
                for axis in _kept(self.choice.given(value), needed):
                    if axis in self.lines[value]:
                        lines.setdefault(axis, self.lines[value][axis])
                    if value in self._weights:
                        self._by_weight.add((node, axis))
            if move := self.marked.move(node):
                for axis in self.choice.given(node).axes_used:
                    lines.setdefault(axis, move.line)

    def _lead(self, node: Node, users: Iterable[Node]) -> None:
        """Give a node the lines of what takes it as it is."""
        lines = self.lines[node]
        for user in users:
            found = self.lines[user]
            pairs = [] if user.op == GETITEM else self._needs(user)
            for value, needed in pairs:
                for axis in _kept(self.choice.given(value), needed) if value is node else ():
                    if axis in found:
                        lines.setdefault(axis, found[axis])
            if user.op == GETITEM:
                for axis, line in found.items():
                    lines.setdefault(axis, line)

    def _needs(self, user: Node) -> list[tuple[Node, Layout]]:
        """What a call takes, weights first, and the layout in which it does."""
        operands = call_operands(user.args, user.kwargs)
        pairs = zip(operands, self.choice.placements[user].operands, strict=True)
        return sorted(pairs, key=lambda pair: pair[0] not in self._weights)

    def _is_view_of_weight(self, node: Node) -> bool:
        return node.op in VIEWS and node.args[0] in self._weights


@lru_cache(maxsize=65536)
def _kept(given: Layout, needed: Layout) -> tuple[str, ...]:
    """The axes over which a value is taken as it is, and is not replicated."""
    return tuple(
        axis
        for axis in needed.axes_used
        if given.state(axis) == needed.state(axis)
        and given.split_dim(axis) == needed.split_dim(axis)
    )


def _more(cost: complex) -> str:
    """How much more another choice costs."""
    if cost.real:
        return f"would move {size_text(int(cost.real))} that no line asks for"
    if more := sent_more(cost):
        return f"would send {size_text(more)} more"
    return "would take longer" if cost.imag else "would do as well"

"""What combinations of placements cost, each priced by itself: the cheapest by trying all."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import cache

from meshwright.compiler.errors import LayoutError
from meshwright.compiler.graph.ir import GETITEM, INPUT, Node
from meshwright.compiler.graph.slots import call_operands
from meshwright.compiler.layout.layout import Layout
from meshwright.compiler.layout.reshard import collectives, cost
from meshwright.compiler.placing.candidates import Candidates
from meshwright.compiler.placing.pricing import pricing
from meshwright.compiler.placing.rules.factories import is_filled
from meshwright.compiler.placing.rules.notation import Placement
from tests.compiler.placing.random_graphs import Problem

Made = tuple[Node, int, Layout]
"""A value in another layout than its own, in a stage: made once, whoever uses it."""

Price = tuple[float, float]
"""What is moved without being asked for, and then all else: compared in this order."""

MOST = 100_000
"""The most combinations, of some first calls, that are tried."""


class TooMany(Exception):
    """There are more combinations than `MOST`."""


class Exhaustive:
    """All combinations of the placements of the calls of a graph."""

    def __init__(self, problem: Problem, candidates: Candidates) -> None:
        of = candidates.of
        self.problem, self.of, self.nodes, self.ignored = problem, of, list(of), candidates.ignored
        self.mesh = problem.graph.mesh
        self.ends: dict[Node, list[tuple[Node, Layout]]] = {}
        for value, layouts in problem.ends.items():
            source = value.args[0] if value.op == GETITEM else value
            self.ends.setdefault(source, []).extend((value, each) for each in layouts)
        self.last = max(node.stage for node in self.nodes)
        self.pricing = pricing(self.mesh, "cpu")
        self.work = {
            node: [float(self.pricing.work(node, each)) for each in of[node]] for node in self.nodes
        }
        # The work of calls that leave no choice is not counted.
        self.work |= {node: [0.0] for node in self.nodes if len(of[node]) == 1}
        self._sent, self._unasked = cache(self._moved), cache(self._gathered)
        self.rest = [0.0] * (len(self.nodes) + 1)
        """What all calls from one on work at the least."""
        for i in reversed(range(len(self.nodes))):
            self.rest[i] = self.rest[i + 1] + min(self.work[self.nodes[i]])

    def total(self, chosen: Mapping[Node, Placement]) -> Price:
        """What one combination costs."""
        made, total = frozenset[Made](), (0.0, 0.0)
        for node in self.nodes:
            more, made = self._more(node, chosen, made)
            total = _sum(total, more)
        return total

    def least(self, below: Price) -> Price:
        """The least total of a combination that costs less than `below`, or `below`."""
        self.tried, self.found = 0, below
        self._try(0, {}, frozenset(), (0.0, 0.0))
        return self.found

    def _try(
        self, i: int, chosen: dict[Node, Placement], made: frozenset[Made], spent: Price
    ) -> None:
        """Try all placements of call `i` and those after it, on those chosen for the calls before
        it; costs are not negative, so what is too dear already is not tried further."""
        if math.isinf(spent[1]) or _sum(spent, (0.0, self.rest[i])) >= self.found:
            return
        if i == len(self.nodes):
            self.found = spent
            return
        self.tried += 1
        if self.tried > MOST:
            raise TooMany
        node = self.nodes[i]
        ways = []
        for placement in self.of[node]:
            chosen[node] = placement
            ways.append((*self._more(node, chosen, made), placement))
        for more, both, placement in sorted(ways, key=lambda way: way[0]):
            chosen[node] = placement
            self._try(i + 1, chosen, both, _sum(spent, more))
        del chosen[node]

    def _more(
        self, node: Node, chosen: Mapping[Node, Placement], made: frozenset[Made]
    ) -> tuple[Price, frozenset[Made]]:
        """What a call adds to what those before it cost, and what is made after it."""
        placement, unasked = chosen[node], 0.0
        work = self.work[node][self._index(node, placement)]
        operands = call_operands(node.args, node.kwargs) if node.op != INPUT else []
        makes = [(value, self.last, layout) for value, layout in self._ended(node)]
        free = self.ignored.get(node, ())
        for place, (value, layout) in enumerate(zip(operands, placement.operands, strict=True)):
            if place in free:
                continue
            makes.append((value, node.stage, layout))
            unasked += self._unasked(node, place, placement, value, _given(value, chosen))
        new = frozenset(makes) - made
        moved = sum(self._sent(value, _given(value, chosen), layout) for value, _, layout in new)
        return (unasked, moved + work), made | new

    def _index(self, node: Node, placement: Placement) -> int:
        """The number of a placement among those of a call, whatever it ignores."""
        free = self.ignored.get(node, ())

        def read(each: Placement) -> tuple[object, ...]:
            return (*(o for i, o in enumerate(each.operands) if i not in free), *each.results)

        return [read(each) for each in self.of[node]].index(read(placement))

    def _ended(self, node: Node) -> Iterator[tuple[Node, Layout]]:
        """The values that a call gives and that are wanted at the end, and in which layout."""
        for value, layout in self.ends.get(node, ()):
            yield value, layout.canonical(self.mesh)

    def _gathered(
        self, user: Node, place: int, placement: Placement, value: Node, given: Layout
    ) -> float:
        """The bytes of what moves an operand without being asked for."""
        wanted = placement.operands[place]
        if given == wanted or _made_anywhere(value, wanted):
            return 0.0
        try:
            steps = collectives(given, wanted, self.mesh)
        except LayoutError:
            return 0.0
        size, total = value.tensor.dtype.itemsize, 0.0
        for each in steps:
            if self.problem.is_unasked(user, place, placement, each):
                total += max(1, round(cost(each.source, each.target, size, self.mesh, True)))
        return total

    def _moved(self, value: Node, given: Layout, wanted: Layout) -> float:
        """The time of sending a value in another layout and, where it has a cotangent that is not
        for parameters alone, for that."""
        if _made_anywhere(value, wanted):
            return 0.0
        given = _without_varying(value, given, wanted)
        back = value.requires_grad and not _of_parameters(value)
        try:
            return self.pricing.moved(given, wanted, value.tensor.dtype.itemsize, back)
        except LayoutError:
            return math.inf


def _sum(one: Price, other: Price) -> Price:
    return one[0] + other[0], one[1] + other[1]


def _given(value: Node, chosen: Mapping[Node, Placement]) -> Layout:
    """The layout in which a value is computed."""
    source, index = value.args if value.op == GETITEM else (value, 0)
    given = chosen[source].results[index]
    assert given is not None
    return given


def _without_varying(value: Node, given: Layout, wanted: Layout) -> Layout:
    """A value without a cotangent is the same on all ranks over which it varies."""
    return (
        given if value.requires_grad else given.drop_varying(set(given.varying) - {*wanted.varying})
    )


def _made_anywhere(value: Node, wanted: Layout) -> bool:
    """Whether a value is one number, which is made as it is wanted."""
    return is_filled(value) and not wanted.partial and not wanted.varying


def _of_parameters(value: Node) -> bool:
    """Whether no argument feeds a value."""
    return value.of_model if value.op == INPUT else all(map(_of_parameters, value.operands()))

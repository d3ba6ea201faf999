"""The choices of what one region keeps that can be best: the least computed again for its bytes.

Each is the optimum of an integer program. A group is kept or not; a value that is not kept is
computed again if something takes it that the backward computes, again or at all; and a storage is
saved if such takes it. From the choice that keeps everything on, each is to save less than the one
before.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from meshwright.compiler.graph.aliasing import memory_of
from meshwright.compiler.graph.ir import Node
from meshwright.compiler.solving.integer import IntegerProgram
from meshwright.passes.budgets.windows import Priced, Window

_MOST = 24
"""About how many choices are looked at for a region."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What a region keeps, as words after `keep=`, and what that comes to."""

    keep: tuple[str, ...]
    priced: Priced


def front(window: Window, keep: Collection[str]) -> Iterator[Choice]:
    """The choices for a region that keeps the groups named `keep` in any case."""
    relation = _Relation(window, keep)
    most = window.whole().saved
    step = max(most // _MOST, 1)
    while (names := relation.cheapest(most)) is not None:
        found = Choice(names, window.priced(names))
        yield found
        most = min(found.priced.saved, most) - step


class _Relation:
    """What follows from what is kept: what is computed again, and what is saved."""

    def __init__(self, window: Window, keep: Collection[str]) -> None:
        self.window, self.later = window, window.later
        self.program = IntegerProgram()
        costs = {node: self.later.cost(node) for node in window.again}
        self.scale = max(sum(costs.values()), 1)
        self.again = {n: self.program.variable(costs[n] / self.scale) for n in window.again}
        self.saved = {memory: self.program.variable() for memory in window.own}
        self.groups: dict[str, int] = {}
        self.group_of: dict[Node, int] = {}
        for name, nodes in window.groups.items():
            # Of what costs the same, less is kept.
            self.groups[name] = self.program.variable(1e-6, integer=True)
            self.group_of.update(dict.fromkeys(nodes, self.groups[name]))
            if name in keep:
                self.program.require({self.groups[name]: 1}, 1)
        for node in window.nodes:
            self._take(node, None)
        for node, variable in self.again.items():
            self._take(node, variable)

    def _take(self, node: Node, needed: int | None) -> None:
        """What a node takes is computed again or saved: always, or if the node is `needed`."""
        if_needed = {} if needed is None else {needed: -1.0}
        always = 1 if needed is None else 0
        for taken in self.later.takes(node):
            memory, group = memory_of(taken), self.group_of.get(taken)
            if taken not in self.again:
                if memory in self.saved and self.later.is_earlier(taken):
                    self.program.require({self.saved[memory]: 1, **if_needed}, always)
                continue
            kept = {} if group is None else {group: 1.0}
            self.program.require({self.again[taken]: 1, **kept, **if_needed}, always)
            if group is not None and memory in self.saved:
                self.program.require({self.saved[memory]: 1, group: -1, **if_needed}, always - 1)

    def cheapest(self, most: int) -> tuple[str, ...] | None:
        """The groups to keep so that at most so many bytes are saved; None if it cannot be."""
        if most < 0:
            return None
        size = max(self.window.whole().saved, 1)
        program = self.program.copy()
        program.require(
            {variable: self.later.size(m) / size for m, variable in self.saved.items()},
            most=most / size,
        )
        found = program.solve()
        if found is None:
            return None
        return tuple(name for name, variable in self.groups.items() if found.values[variable] > 0.5)

"""Choose a placement for every call, so that least is moved and computed in all.

What changes the layout of a value, its adjoint included, is paid once for each layout that any of
its users needs, in each stage. The adjoint of what comes from parameters and constants alone is not
counted: their gradients are reduced once, however work is split.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from meshwright.compiler.errors import LayoutError
from meshwright.compiler.graph.ir import GETITEM, INPUT, Node
from meshwright.compiler.graph.slots import call_operands
from meshwright.compiler.layout.layout import Layout
from meshwright.compiler.layout.reshard import Collective, collectives, cost
from meshwright.compiler.placing.candidates import Candidates
from meshwright.compiler.placing.pricing import pricing
from meshwright.compiler.placing.rules.factories import is_filled
from meshwright.compiler.placing.rules.notation import Placement
from meshwright.compiler.solving.minsum import (
    Cost,
    Costs,
    Infeasible,
    Margins,
    Solution,
    Table,
    minimise,
)

Unasked: TypeAlias = Callable[[Node, int, Placement, Collective], bool]
"""Whether a change of layout is one that the plan does not ask for, and should: of the operand of a
user, by its place, before a placement of this user."""


class Contradiction(LayoutError):
    """No placements of `nodes` go together: what is asked of some leaves none for others."""

    def __init__(self, nodes: Iterable[Node]) -> None:
        self.nodes = tuple(nodes)
        names = ", ".join(f"`{node.name}`" for node in self.nodes)
        super().__init__(
            f"no layouts of {names} go together",
            help="leave out one of the lines that ask for them",
        )


@dataclass(frozen=True)
class Use:
    """A use of a value: by `user`, as its operand `place`; or, without a user, in one layout."""

    user: Node | None
    place: int
    layout: Layout | None = None
    stage: int = 0


@dataclass
class Choice:
    """The placements that were chosen, by node, and how they were found."""

    placements: Mapping[Node, Placement]
    solution: Solution
    others: Callable[[Node], Sequence[tuple[Placement, Cost]]] = field(repr=False)
    """The placements that a call may have, and what each would cost more."""

    def next_best(self, node: Node) -> tuple[Placement, complex] | None:
        """The cheapest other placement of a call, all others being as they are, and what it would
        cost more; None where there is none."""
        found = [
            (placement, complex(cost))
            for placement, cost in self.others(node)
            if placement != self.placements[node] and np.isfinite(cost)
        ]
        return min(found, key=lambda each: (each[1].real, each[1].imag), default=None)

    def given(self, value: Node) -> Layout:
        """The layout that a value has."""
        source, index = (value.args[0], value.args[1]) if value.op == GETITEM else (value, 0)
        found = self.placements[source].results[index]
        assert found is not None
        return found

    def moves(self, node: Node) -> bool:
        """Whether an operand of a call is in another layout, apart from varying, than the call
        needs."""
        pairs = zip(
            call_operands(node.args, node.kwargs), self.placements[node].operands, strict=True
        )
        return any(self.given(n).drop_varying() != needed.drop_varying() for n, needed in pairs)


def choose(
    candidates: Candidates,
    ends: Mapping[Node, Sequence[Layout]] | None = None,
    unasked: Unasked = lambda user, place, placement, collective: False,
    device: str = "cpu",
) -> Choice:
    """The placements of a graph that move least without being asked to, and cost least of those.

    `ends` are the layouts in which some values are wanted besides, as outputs are; `device` is the
    type of the ranks' devices.
    """
    return _Problem(candidates, ends or {}, unasked, device).solved()


class _Problem:
    """Costs are complex: the bytes moved that the plan should ask for, then all that it costs."""

    def __init__(
        self,
        candidates: Candidates,
        ends: Mapping[Node, Sequence[Layout]],
        unasked: Unasked,
        device: str,
    ) -> None:
        self.candidates, self.graph, self.mesh = candidates, candidates.graph, candidates.mesh
        self.unasked = unasked
        self.pricing = pricing(self.mesh, device)
        self.sizes: list[int] = []
        self.tables: list[Table] = []
        self.variable: dict[Node, int] = {}
        self.made: list[int] = []
        """The variables that say whether a layout is made, which follow from the others."""
        self.uses: dict[Node, list[Use]] = {}
        self._rooted: dict[Node, bool] = {}
        for node, options in candidates.of.items():
            self.variable[node] = self._variable(len(options))
            if len(options) > 1:
                work = [1j * self.pricing.work(node, each) for each in options]
                self.tables.append(Table((self.variable[node],), np.array(work)))
        for node in self.graph.nodes:
            if node.op not in (INPUT, GETITEM):
                for place, value in enumerate(call_operands(node.args, node.kwargs)):
                    self.uses.setdefault(value, []).append(Use(node, place, stage=node.stage))
        for value, layouts in ends.items():
            for layout in layouts:
                self.uses.setdefault(value, []).append(
                    Use(None, 0, layout.canonical(self.mesh), value.stage)
                )
        for value, uses in self.uses.items():
            for stage in dict.fromkeys(use.stage for use in uses):
                self._moved(value, [use for use in uses if use.stage == stage])

    def solved(self) -> Choice:
        try:
            found = minimise(self.sizes, self.tables)
        except Infeasible as error:
            raise Contradiction(
                node for node, own in self.variable.items() if own in error.variables
            ) from None
        placements = {
            node: options[found.choices[self.variable[node]]]
            for node, options in self.candidates.of.items()
        }
        margins = Margins(self.tables, found.choices, self.made)

        def others(node: Node) -> Sequence[tuple[Placement, Cost]]:
            options = self.candidates.of[node]
            return list(zip(options, margins.of(self.variable[node], len(options)), strict=True))

        return Choice(placements, found, others)

    def _variable(self, size: int) -> int:
        self.sizes.append(size)
        return len(self.sizes) - 1

    def _moved(self, value: Node, uses: Sequence[Use]) -> None:
        """Add what it costs to bring a value to where it is used."""
        given = self._given(value)
        needs = [self._needs(use) for use in uses]
        prices: dict[Layout, Costs] = {}
        for layout in dict.fromkeys(itertools.chain.from_iterable(needs)):
            prices[layout] = np.array([self._price(value, each, layout) for each in given])
        if {*given} == {*prices} and len(prices) == 1:
            return
        own = self.variable[value.args[0] if value.op == GETITEM else value]
        for use, need in zip(uses, needs, strict=True):
            self._add((own, use), self._unasked(value, given, use, need))
        if len(uses) == 1:
            (use,), (need,) = uses, needs
            self._add((own, use), np.stack([prices[layout] for layout in need], 1))
            return
        for layout, price in prices.items():
            if price.any():
                self._once(own, price, layout, uses, needs)

    def _given(self, value: Node) -> list[Layout]:
        """The layout of a value by each placement of what gives it."""
        source, index = (value.args[0], value.args[1]) if value.op == GETITEM else (value, 0)
        found = [each.results[index] for each in self.candidates.of[source]]
        return [each for each in found if each is not None]

    def _once(
        self,
        own: int,
        price: Costs,
        layout: Layout,
        uses: Sequence[Use],
        needs: Sequence[Sequence[Layout]],
    ) -> None:
        """Pay for one layout where any use needs it."""
        made = self._variable(2)
        self.made.append(made)
        self.tables.append(Table((own, made), np.stack([np.zeros_like(price), price], 1)))
        for use, need in zip(uses, needs, strict=True):
            wants = np.array([each == layout for each in need])
            if wants.any():
                table = np.zeros((2, len(need)), dtype=complex)
                table[0, wants] = math.inf
                self._add((made, use), table)

    def _add(self, scope: tuple[int, Use], costs: Costs) -> None:
        first, use = scope
        second = None if use.user is None else self.variable[use.user]
        if not costs.any():
            return
        if second is None:
            self.tables.append(Table((first,), costs[:, 0]))
        else:
            self.tables.append(Table((first, second), costs))

    def _needs(self, use: Use) -> tuple[Layout, ...]:
        """The layout in which each placement of a user takes the value."""
        if use.user is None:
            assert use.layout is not None
            return (use.layout,)
        return tuple(each.operands[use.place] for each in self.candidates.of[use.user])

    def _price(self, value: Node, given: Layout, wanted: Layout) -> complex:
        there = wanted in self.candidates.elsewhere.get(value, ())
        if given == wanted or there or _is_made(value, wanted):
            return 0j
        differentiated = value.requires_grad and not self._is_rooted(value)
        given, size = _as_moved(value, given, wanted), value.tensor.dtype.itemsize
        try:
            return 1j * self.pricing.moved(given, wanted, size, differentiated)
        except LayoutError:
            return complex(math.inf)

    def _unasked(
        self, value: Node, given: Sequence[Layout], use: Use, need: Sequence[Layout]
    ) -> Costs:
        """The bytes moved to bring a value to one use that the plan should ask for."""
        found = np.zeros((len(given), len(need)), dtype=complex)
        if use.user is None:
            return found
        options = self.candidates.of[use.user]
        for (i, own), (j, wanted) in itertools.product(enumerate(given), enumerate(need)):
            if own != wanted and not _is_made(value, wanted):
                found[i, j] = self._unasked_bytes(value, own, wanted, use, options[j])
        return found

    def _unasked_bytes(
        self, value: Node, given: Layout, wanted: Layout, use: Use, placement: Placement
    ) -> float:
        assert use.user is not None
        try:
            taken = collectives(_as_moved(value, given, wanted), wanted, self.mesh)
        except LayoutError:
            return 0.0
        size = value.tensor.dtype.itemsize
        return sum(
            max(1, round(cost(each.source, each.target, size, self.mesh, True)))
            for each in taken
            if self.unasked(use.user, use.place, placement, each)
        )

    def _is_rooted(self, value: Node) -> bool:
        """Whether a value is computed from parameters, buffers and constants alone."""
        if value not in self._rooted:
            self._rooted[value] = (
                value.of_model if value.op == INPUT else all(map(self._is_rooted, value.operands()))
            )
        return self._rooted[value]


def _as_moved(value: Node, given: Layout, wanted: Layout) -> Layout:
    """The layout that a value is brought from: where nothing is differentiated, one that varies is
    replicated."""
    if value.requires_grad:
        return given
    return given.drop_varying(set(given.varying) - set(wanted.varying))


def _is_made(value: Node, wanted: Layout) -> bool:
    """Whether a value of one number is made in the layout that is wanted of it."""
    return is_filled(value) and not wanted.partial and not wanted.varying

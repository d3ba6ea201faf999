"""Choose a placement for every call, so that least is moved and computed in all.

What changes the layout of a value, its adjoint included, is paid once for each layout that any of
its users needs, in each stage. The adjoint of what comes from parameters and constants alone is not
counted: their gradients are reduced once, however work is split.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np

from meshwright.compiler.errors import LayoutError
from meshwright.compiler.graph.ir import GETITEM, INPUT, Node
from meshwright.compiler.graph.slots import call_operands
from meshwright.compiler.graph.weights import input_behind
from meshwright.compiler.layout.layout import Layout, replicated
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
_Moves: TypeAlias = tuple[int, tuple[tuple[tuple[int, ...], Costs], ...]]
"""How many layouts are made once for several uses, and tables over the value, its uses and these:
each by its number in this order."""


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
    """The other placements that a call may have, and what each would cost more."""

    def next_best(self, node: Node) -> tuple[Placement, complex] | None:
        """The cheapest other placement of a call, all others being as they are, and what it would
        cost more; None where there is none."""
        found = [
            (placement, complex(cost)) for placement, cost in self.others(node) if np.isfinite(cost)
        ]
        return min(found, key=lambda each: (each[1].real, each[1].imag), default=None)

    def given(self, value: Node) -> Layout:
        """The layout that a value has."""
        source, index = _source(value)
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
    alike: Callable[[Node], Hashable] = lambda user: user,
) -> Choice:
    """The placements of a graph that move least without being asked to, and cost least of those.

    `ends` are the layouts in which some values are wanted besides, in the last stage, as outputs
    are; `device` is the type of the ranks' devices. Users which are `alike` are given the same
    answers by `unasked`, for values of the same type in the same layouts that are used as these
    are.
    """
    return _Problem(candidates, ends or {}, unasked, device, alike).solved()


class _Problem:
    """Costs are complex: the bytes moved that the plan should ask for, then all that it costs."""

    def __init__(
        self,
        candidates: Candidates,
        ends: Mapping[Node, Sequence[Layout]],
        unasked: Unasked,
        device: str,
        alike: Callable[[Node], Hashable],
    ) -> None:
        self.candidates, self.graph, self.mesh = candidates, candidates.graph, candidates.mesh
        self.unasked, self.alike = unasked, alike
        self.pricing = pricing(self.mesh, device)
        self.last = max(node.stage for node in self.graph.nodes)
        self.sizes: list[int] = []
        self.tables: list[Table] = []
        self.variable: dict[Node, int] = {}
        self.only = self._variable(1)
        """Stands for uses without a user, which have no choice."""
        self.made: list[int] = []
        """The variables that say whether a layout is made, which follow from the others."""
        self.uses: dict[Node, list[Use]] = {}
        self._rooted: dict[Node, bool] = {}
        self._known: dict[Hashable, _Moves] = {}
        """What is moved of values that are alike."""
        works: dict[Hashable, Costs] = {}
        for node, options in candidates.of.items():
            self.variable[node] = self._variable(len(options))
            if len(options) > 1:
                kind = candidates.kinds[node]
                if kind not in works:
                    works[kind] = np.array([1j * self.pricing.work(node, each) for each in options])
                self.tables.append(Table((self.variable[node],), works[kind]))
        for node in self.graph.nodes:
            if node.op not in (INPUT, GETITEM):
                free = candidates.ignored.get(node, ())
                for place, value in enumerate(call_operands(node.args, node.kwargs)):
                    if place not in free:
                        self.uses.setdefault(value, []).append(Use(node, place, stage=node.stage))
        for value, layouts in ends.items():
            for layout in layouts:
                self.uses.setdefault(value, []).append(
                    Use(None, 0, layout.canonical(self.mesh), self.last)
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
        chosen = {node: found.choices[own] for node, own in self.variable.items()}
        margins = Margins(self.tables, found.choices, self.made)

        def others(node: Node) -> Sequence[tuple[Placement, Cost]]:
            options = self.candidates.of[node]
            costs = margins.of(self.variable[node], len(options))
            pairs = enumerate(zip(options, costs, strict=True))
            return [pair for i, pair in pairs if i != chosen[node]]

        return Choice(self._placements(chosen), found, others)

    def _placements(self, chosen: Mapping[Node, int]) -> dict[Node, Placement]:
        """The placements of these numbers, with operands that a call ignores as they are."""
        found = {node: options[chosen[node]] for node, options in self.candidates.of.items()}
        for node, places in self.candidates.ignored.items():
            if places:
                operands = list(found[node].operands)
                values = tuple(call_operands(node.args, node.kwargs))
                for place in places:
                    source, index = _source(values[place])
                    operands[place] = found[source].results[index] or operands[place]
                found[node] = replace(found[node], operands=tuple(operands))
        return found

    def _variable(self, size: int) -> int:
        self.sizes.append(size)
        return len(self.sizes) - 1

    def _moved(self, value: Node, uses: Sequence[Use]) -> None:
        """Add what it costs to bring a value to where it is used."""
        key = self._key(value, uses)
        if key not in self._known:
            self._known[key] = self._moves(value, uses)
        made, tables = self._known[key]
        source, _ = _source(value)
        numbers = [self.variable[source]]
        numbers += [self.variable[use.user] if use.user else self.only for use in uses]
        for _ in range(made):
            self.made.append(self._variable(2))
            numbers.append(self.made[-1])
        self.tables += [Table(tuple(numbers[i] for i in scope), costs) for scope, costs in tables]

    def _key(self, value: Node, uses: Sequence[Use]) -> Hashable:
        """What the cost of moving a value depends on."""
        source, index = _source(value)
        kinds = self.candidates.kinds
        return (
            kinds[source],
            index,
            value.requires_grad,
            self._is_rooted(value),
            _is_made(value, replicated(value.tensor.shape)),
            self.candidates.elsewhere.get(value),
            input_behind(value) is None,
            uses[0].stage == self.last,
            *(
                tuple(
                    (kinds[use.user], use.place, self.alike(use.user)) if use.user else use.layout
                    for use in each
                )
                for each in (uses, self.uses[value])
            ),
        )

    def _moves(self, value: Node, uses: Sequence[Use]) -> _Moves:
        given = self._given(value)
        needs = [self._needs(use) for use in uses]
        prices: dict[Layout, Costs] = {}
        for layout in dict.fromkeys(itertools.chain.from_iterable(needs)):
            prices[layout] = np.array(
                [self._price(value, each, layout, uses[0].stage) for each in given]
            )
        if {*given} == {*prices} and len(prices) == 1:
            return 0, ()
        found = [
            ((0, i), self._unasked(value, given, use, need))
            for i, (use, need) in enumerate(zip(uses, needs, strict=True), 1)
        ]
        if len(uses) == 1:
            found.append(((0, 1), np.stack([prices[layout] for layout in needs[0]], 1)))
        several = [layout for layout, price in prices.items() if price.any() and len(uses) > 1]
        for made, layout in enumerate(several, len(uses) + 1):
            # It is paid for where any use needs it.
            price = prices[layout]
            found.append(((0, made), np.stack([np.zeros_like(price), price], 1)))
            for i, need in enumerate(needs, 1):
                table = np.zeros((len(need), 2), dtype=complex)
                table[[each == layout for each in need], 0] = math.inf
                found.append(((i, made), table))
        return len(several), tuple((scope, costs) for scope, costs in found if costs.any())

    def _given(self, value: Node) -> list[Layout]:
        """The layout of a value by each placement of what gives it."""
        source, index = _source(value)
        found = [each.results[index] for each in self.candidates.of[source]]
        return [each for each in found if each is not None]

    def _needs(self, use: Use) -> tuple[Layout, ...]:
        """The layout in which each placement of a user takes the value."""
        if use.user is None:
            assert use.layout is not None
            return (use.layout,)
        return tuple(each.operands[use.place] for each in self.candidates.of[use.user])

    def _price(self, value: Node, given: Layout, wanted: Layout, stage: int) -> complex:
        there = wanted in self.candidates.elsewhere.get(value, ())
        if given == wanted or there or _is_made(value, wanted):
            return 0j
        differentiated = value.requires_grad and not self._is_rooted(value)
        given, size = _as_moved(value, given, wanted), value.tensor.dtype.itemsize
        try:
            # What a stage has only after its loop, no later stage can take in its own.
            act = 1 if stage == self.last else len(self.graph.nodes)
            return 1j * self.pricing.moved(given, wanted, size, differentiated, act=act)
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


def _source(value: Node) -> tuple[Node, int]:
    """The call that gives a value, and which of its results it is."""
    return (value.args[0], value.args[1]) if value.op == GETITEM else (value, 0)


def _as_moved(value: Node, given: Layout, wanted: Layout) -> Layout:
    """The layout that a value is brought from: where nothing is differentiated, one that varies is
    replicated."""
    if value.requires_grad:
        return given
    return given.drop_varying(set(given.varying) - set(wanted.varying))


def _is_made(value: Node, wanted: Layout) -> bool:
    """Whether a value of one number is made in the layout that is wanted of it."""
    return is_filled(value) and not wanted.partial and not wanted.varying

"""What a model computes for rows of its experts, from their first product to their last.

Experts are matrices stacked in one parameter, by which each row is multiplied as its number says
(`mesh::grouped_mm`). What treats these rows each alone belongs to them, up to the last product or
the bias behind it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch

from meshwright.compiler.composites.grouped import GroupedMM
from meshwright.compiler.graph.ir import GETITEM, INPUT, Node, Op
from meshwright.compiler.graph.slots import call_operands
from meshwright.compiler.placing.composite import composite_of
from meshwright.compiler.placing.rules.views import RESHAPES
from meshwright.dsl.statements import Experts
from meshwright.passes.rewriting.equivariance import carried
from meshwright.passes.statements.draft import Draft
from meshwright.passes.statements.targets import modules_of

aten = torch.ops.aten

_BROUGHT = {
    aten.transpose.int, aten.t.default, aten.permute.default, aten._to_copy.default,
    aten.contiguous.default, aten.clone.default, aten.view.default,
}  # fmt: skip
"""Operators through which a stacked parameter is still one."""

_LOOKUPS = (aten.index.Tensor, aten.index_select.default)

_SIZED: tuple[Op, ...] = (
    aten.expand.default, aten.expand_copy.default, aten.broadcast_to.default, aten.repeat.default,
    aten.tile.default,
)  # fmt: skip
"""Operators with arguments that say how many rows there are."""


@dataclass(frozen=True, eq=False)
class Region:
    """Rows of experts that one statement places: `group[r, t]` has the number of each."""

    statement: Experts
    group: Node
    experts: int

    @property
    def shape(self) -> tuple[int, int]:
        """How many rows there are, and how many numbers each has."""
        rows, times = self.group.tensor.shape
        return rows, times


@dataclass(frozen=True)
class Rows:
    """A value with the rows of a region in its first `dims`; with `added`, one of parameters alone,
    such as a bias."""

    region: Region
    dims: int
    added: bool = False


@dataclass
class Inside:
    """The nodes that belong to experts, each with its rows, and the `parameters` of these."""

    nodes: dict[Node, Rows] = field(default_factory=dict)
    parameters: dict[Node, Experts] = field(default_factory=dict)


def inside(draft: Draft, statements: Mapping[str, Experts] | None = None) -> Inside:
    """What belongs to the experts that `experts` statements place; or `statements`, by module."""
    finder = _Finder(draft, placing(draft) if statements is None else statements)
    for node in draft.graph.nodes:
        rows = finder.rows_of(node)
        if rows is not None:
            finder.found[node] = rows
    return Inside(dict(finder.kept()), finder.parameters)


def placing(draft: Draft) -> dict[str, Experts]:
    """By module: the statement that places the experts that are in it."""
    if not draft.plan.of(Experts):
        return {}
    resolved = draft.plan.resolve(Experts, modules_of(draft, Experts))
    return {name: each for name, each in resolved.items() if each.count is None or each.dropless}


class _Finder:
    """Follows rows from products and lookups through what treats each alone."""

    def __init__(self, draft: Draft, statements: Mapping[str, Experts]) -> None:
        self.draft, self.users, self.statements = draft, draft.graph.users(), statements
        self.found: dict[Node, Rows] = {}
        self.parameters: dict[Node, Experts] = {}
        self.regions: dict[tuple[Node, Experts], Region] = {}
        # What the plan lays out as it is stays in the order of the tokens.
        self.pinned = {*draft.values, *draft.entering}
        self.pinned |= {value for pins in draft.entering.values() for value, _ in pins}
        for node in draft.graph.nodes if self.statements else ():
            if node.op == GroupedMM.op and (statement := self._statement(node.args[1])):
                group = node.args[2]
                region = Region(statement, group, node.args[1].tensor.shape[0])
                self.regions.setdefault((_numbers(group), statement), region)

    def _statement(self, weight: Node) -> Experts | None:
        """The statement that places a stacked parameter."""
        source = _parameter(weight)
        path = str(source.args[1]).rpartition(".")[0] if source else ""
        while source is not None:
            if path in self.statements or not path:
                return self.statements.get(path)
            path = path.rpartition(".")[0]
        return None

    def rows_of(self, node: Node) -> Rows | None:
        """The rows that a node has, if it treats each alone."""
        if node in self.pinned or not self.regions:
            return None
        if node.op == GroupedMM.op:
            return self._product(node)
        if node.op in _LOOKUPS and (found := self._lookup(node)):
            return found
        given = [each for each in node.operands() if each in self.found]
        if not given or len({self.found[each].region for each in given}) > 1:
            return None
        if node.op == GETITEM:
            return self.found[given[0]]
        if node.op in RESHAPES:
            return self._reshaped(node, self.found[given[0]])
        return self._alone(node)

    def _product(self, node: Node) -> Rows | None:
        x, weight, group = node.args
        statement = self._statement(weight)
        region = self.regions.get((_numbers(group), statement)) if statement else None
        if region is None or group.tensor.shape != region.group.tensor.shape:
            return None
        if x in self.found and self.found[x].region is not region:
            return None
        self._note(weight, region)
        return Rows(region, 2)

    def _lookup(self, node: Node) -> Rows | None:
        """Rows of a stacked parameter by the numbers of a region, such as a bias."""
        table, index = lookup_parts(node)
        statement = self._statement(table)
        region = self.regions.get((_numbers(index), statement)) if statement and index else None
        if region is None or index is None or table.tensor.shape[0] != region.experts:
            return None
        self._note(table, region)
        return Rows(region, len(index.tensor.shape), added=True)

    def _note(self, weight: Node, region: Region) -> None:
        source = _parameter(weight)
        assert source is not None
        self.parameters[source] = region.statement

    def _reshaped(self, node: Node, rows: Rows) -> Rows | None:
        (operand,) = node.operands()
        total, shape = math.prod(rows.region.shape), node.tensor.shape
        dims = next((n for n in range(1, len(shape) + 1) if math.prod(shape[:n]) == total), None)
        if dims is None or math.prod(operand.tensor.shape[: rows.dims]) != total:
            return None
        return Rows(rows.region, dims, rows.added)

    def _alone(self, node: Node) -> Rows | None:
        """Through an operator whose rule says that it treats each row alone."""
        known = composite_of(node.op)
        draws = known is not None and known.number is not None and node.args[known.number]
        operands = list(enumerate(call_operands(node.args, node.kwargs)))
        given = {i: self.found[each] for i, each in operands if each in self.found}
        dims = next(iter(given.values())).dims
        if draws or node.op in _SIZED or any(each.dims != dims for each in given.values()):
            return None
        for dim in range(dims):
            if all(each.tensor.shape[dim] == 1 for i, each in operands if i in given):
                continue
            places = carried(node, dict.fromkeys(given, dim), self.draft.graph.mesh)
            if places is None or any(place != dim for place in places):
                return None
        added = all(each.added for each in given.values())
        return Rows(next(iter(given.values())).region, dims, added)

    def kept(self) -> Iterator[tuple[Node, Rows]]:
        """What leads to a product, or adds a bias to one; the rest may stay with the tokens."""
        needed: set[Node] = set()
        for node in reversed(self.draft.graph.nodes):
            rows = self.found.get(node)
            if rows is None:
                continue
            ends = node.op == GroupedMM.op or (not rows.added and self._adds(node))
            if ends or any(user in needed for user in self.users[node]):
                needed.add(node)
        yield from ((node, rows) for node, rows in self.found.items() if node in needed)

    def _adds(self, node: Node) -> bool:
        return any(self.found[each].added for each in node.operands() if each in self.found)


def lookup_parts(node: Node) -> tuple[Node, Node | None]:
    """The table and the index of a lookup of whole rows."""
    if node.op == aten.index.Tensor:
        table, (index, *others) = node.args
        return table, index if not any(each is not None for each in others) else None
    table, dim, index = node.args
    return table, index if dim == 0 else None


def viewed(node: Node) -> Node:
    """The value that a node is a view of."""
    while node.op in RESHAPES:
        node = node.operands()[0]
    return node


def _numbers(group: Node) -> Node:
    """The numbers that a node is a view of, whatever their type."""
    while (source := viewed(group)).op == aten._to_copy.default:
        group = source.operands()[0]
    return source


def _parameter(weight: Node) -> Node | None:
    """The stacked parameter that a node brings to a product, its experts still its first dim."""
    count = weight.tensor.shape[:1]
    while weight.op in _BROUGHT and weight.tensor.shape[:1] == count:
        weight = weight.args[0]
    is_parameter = weight.op == INPUT and weight.args[0] == "parameter"
    return weight if is_parameter and weight.tensor.shape[:1] == count else None

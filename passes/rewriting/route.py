"""Leave out permutations of rows that are undone later, so that routing stays within a shard.

Before:  argsort: i64[16]          = argsort(view)
         floor_divide: i64[16]     = floor_divide(argsort, 2)
         index: f32[16, 16]        = index(x, [floor_divide])
         bucketize: i64[16]        = bucketize(arange, to_copy_1, right=True)
         unsqueeze: i64[16, 1]     = unsqueeze(bucketize, 1)
         grouped_mm: f32[16, 1, 8] = mesh::grouped_mm(index, up, unsqueeze)
         argsort_1: i64[16]        = argsort(argsort)
         index_2: f32[16, 16]      = index(mul_1, [argsort_1])
After:   topk_1: i64[8, 2]        = topk[1]
         grouped_mm: f32[8, 2, 8] = mesh::grouped_mm(x, up, topk_1)
         view_3: f32[16, 1, 8]    = view(grouped_mm, [16, 1, 8])
         view_5_1: f32[8, 2, 16]  = view(mul_1, [8, 2, 16])
         sum: f32[8, 16]          = sum(view_5_1, [1])

A mixture of experts sorts its tokens by expert, computes row by row and puts the rows back in
order. Over a batch that is split the sort needs every token. But a function of rows is the same in
any order of them: f(x[p])[q], where q is the inverse of p, is f(x), whatever p is. A value
that is permuted is followed from the sort on, through operators whose rules say that rows do not
mix, to where it is put back, summed or counted. Where all of a sort's uses end so, it is left out
with all that follows from it; where one does not, the sort and its uses stay as they are.

Requires: a normalised graph, not yet placed. Ensures: the same values, whatever the plan.
Elsewhere: the token permutation of Megatron's expert layers, which is written for one rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from meshwright.compiler.composites.grouped import GroupedMM
from meshwright.compiler.graph.ir import GETITEM, Arg, Builder, Graph, Node, Op
from meshwright.compiler.graph.slots import call_operands
from meshwright.compiler.placing.rules.factories import makes_zeros
from meshwright.passes.rewriting.counts import (
    ARGSORTS,
    SORTS,
    grouped_by,
    option,
    same_value,
    source,
)
from meshwright.passes.rewriting.equivariance import carried, is_vector
from meshwright.passes.rewriting.recognise import constant
from meshwright.passes.rewriting.rewriter import emit_for

aten = torch.ops.aten


def route(graph: Graph) -> Graph:
    """The graph without those sorts of vectors whose every use is the same without them."""
    sorts = _sorts(graph)
    while sorts:
        router = _Router(graph, sorts)
        routed = router.run()
        if not router.kept:
            return routed
        sorts = {node: key for node, key in sorts.items() if key not in router.kept}
    return graph


def _sorts(graph: Graph) -> dict[Node, Node]:
    """The sorts of vectors, each with the first that gives the same order."""
    first: dict[tuple[Arg, ...], Node] = {}
    found: dict[Node, Node] = {}
    for node in graph.nodes:
        if node.op in (*SORTS, *ARGSORTS) and is_vector(node.args[0]):
            options = [option(node, name) for name in ("stable", "descending")]
            found[node] = first.setdefault((node.args[0], *map(bool, options)), node)
    return found


@dataclass(frozen=True, slots=True)
class Permuted:
    """A value whose elements along `dim` are those of `rows`, a node of the new graph, in the order
    that `by`, a sort of the old one, gives."""

    rows: Node
    dim: int
    by: Node


class _Router:
    """One attempt, which assumes that every sort in `sorts` can be left out; `kept` are those that
    some use shows to be needed. If there are any, the graph that it has made is not valid."""

    def __init__(self, graph: Graph, sorts: Mapping[Node, Node]) -> None:
        self.graph, self.sorts, self.users = graph, sorts, graph.users()
        self.builder = Builder(graph.name, graph.mesh)
        self.kept: set[Node] = set()
        self.values: dict[Node, Node] = {}
        self.permuted: dict[Node, Permuted] = {}
        self.inverse: dict[Node, Node] = {}
        """By node that is the inverse of an order: the sort that gives the order."""
        self.results: dict[Node, tuple[tuple[int | None, ...], Node]] = {}
        """By node with multiple results: the dim in which each is permuted, and by which sort."""
        self.repeated: dict[Node, Node] = {}
        """By matrix of the new graph that repeats each row of another: that other."""

    def run(self) -> Graph:
        for node in self.graph.nodes:
            handler = _HANDLERS.get(node.op)
            if not (handler and handler(self, node)):
                self._carry(node)
        return self.builder.graph(
            output.of(self.value(output.node)) for output in self.graph.outputs
        )

    def value(self, node: Node) -> Node:
        """The new node for a value in its own order; if it is permuted, its sort has to stay."""
        if node in self.permuted:
            self.kept.add(self.permuted[node].by)
            return self.permuted[node].rows
        if node in self.inverse:
            self.kept.add(self.inverse[node])
        return self.values[node]

    def places(self, node: Node, like: Node) -> Node:
        """The places of a vector's elements: 0, 1, 2, ..."""
        size = like.tensor.shape[0]
        return self.call(node, aten.arange.default, size, dtype=torch.int64)

    def call(self, node: Node, op: Op, *args: Arg, **kwargs: Arg) -> Node:
        """A call that stands for a part of `node`."""
        return emit_for(node, self.builder, op, args, kwargs)

    def _carry(self, node: Node) -> None:
        """Copy a node, on permuted operands in their first order where the order does not count."""
        found = {i: self.permuted[n] for i, n in _operands(node) if n in self.permuted}
        if len({p.by for p in found.values()}) == 1:
            dims = carried(node, {i: p.dim for i, p in found.items()}, self.graph.mesh)
            if dims is not None:
                mapping = {
                    n: self.permuted[n].rows if n in self.permuted else self.value(n)
                    for n in node.operands()
                }
                new = self.builder.copy(node, mapping)
                self._note(node, new, dims, next(iter(found.values())).by)
                return
        self.values[node] = self.builder.copy(node, {n: self.value(n) for n in node.operands()})

    def _note(self, node: Node, new: Node, dims: tuple[int | None, ...], by: Node) -> None:
        if isinstance(node.type, tuple):
            self.values[node], self.results[node] = new, (dims, by)
        elif dims[0] is None:
            self.values[node] = new
        else:
            self.permuted[node] = Permuted(new, dims[0], by)

    def item(self, node: Node) -> bool:
        """One of multiple results. Those of a sort are its operand's elements and their places."""
        parent, index = node.args
        if parent in self.results and parent.op in SORTS and is_vector(parent.args[0]):
            (_, by), x = self.results[parent], parent.args[0]
            inverse = x in self.permuted
            if index == 0 and inverse:
                self.values[node] = self.permuted[x].rows
            elif index == 0:
                self.permuted[node] = Permuted(self.value(x), 0, by)
            else:
                self._order(node, x, by)
            return True
        if parent in self.results:
            dims, by = self.results[parent]
            new = self.builder.copy(node, {parent: self.values[parent]})
            self._note(node, new, dims[index : index + 1], by)
            return True
        return False

    def sort(self, node: Node) -> bool:
        """The order of an order is its inverse; any other sort of a vector gives an order."""
        x = node.args[0]
        by = self.sorts.get(node)
        if x in self.permuted and is_vector(x):
            ascending = not option(node, "descending")
            permuted = self.permuted[x]
            by = permuted.by if ascending and _is_places(permuted.rows) else None
        if by is None:
            return False
        if node.op in SORTS:
            self.results[node] = ((0, 0), by)
        else:
            self._order(node, x, by)
        return True

    def _order(self, node: Node, x: Node, by: Node) -> None:
        places = self.places(node, x)
        if x in self.permuted:
            self.values[node], self.inverse[node] = places, by
        else:
            self.permuted[node] = Permuted(places, 0, by)

    def groups(self, node: Node) -> bool:
        """The groups of rows that are sorted by group, worked out from where the groups end."""
        found = grouped_by(node.args[1])
        if found is None or not node.kwargs.get("right") or not _is_places(node.args[0]):
            return False
        sorts = [sort for sort in self.sorts if self._orders(sort, found, node)]
        if not sorts:
            return False
        # Sorts of the same numbers may order equal ones differently: take that of the rows.
        used = {self.permuted[n].by for n in self._used_with(node) if n in self.permuted}
        sort = next((sort for sort in sorts if self.sorts[sort] in used), sorts[0])
        rows = self.values[sort.args[0]]
        if rows.tensor.dtype != node.tensor.dtype:
            rows = self.call(node, aten._to_copy.default, rows, dtype=node.tensor.dtype)
        self.permuted[node] = Permuted(rows, 0, self.sorts[sort])
        return True

    def _orders(self, sort: Node, ids: Node, groups: Node) -> bool:
        """Whether a sort gives these elements in ascending order, as many as there are groups."""
        x: Node = sort.args[0]
        ascending = x in self.values and not option(sort, "descending")
        elements = source(x)
        if not ascending or elements is None or x.tensor.shape != groups.tensor.shape:
            return False
        return same_value(elements, ids)

    def _used_with(self, node: Node) -> list[Node]:
        """The operands of all calls that use a node or a view of it."""
        users = [user for view in self.users[node] for user in self.users[view]]
        return [n for user in users for n in user.operands()]

    def product(self, node: Node) -> bool:
        """Each row meets its group's matrix in the first order; a row that was repeated to meet
        multiple matrices is given once."""
        x, weight, group = node.args
        if x not in self.permuted or group not in self.permuted or weight in self.permuted:
            return False
        rows, by = self.permuted[x].rows, self.permuted[x].by
        if by is not self.permuted[group].by or self.permuted[x].dim != 0:
            return False
        groups = _matrix(self.permuted[group].rows)
        if rows in self.repeated and self.repeated[rows].tensor.shape[0] == groups.tensor.shape[0]:
            rows = self.repeated[rows]
        elif len(rows.tensor.shape) == 2:
            shape = (*groups.tensor.shape, rows.tensor.shape[1])
            rows = self.call(node, aten.view.default, rows, shape)
        y = self.call(node, node.op, rows, self.value(weight), groups)
        y = self.call(node, aten.view.default, y, node.tensor.shape)
        self.permuted[node] = Permuted(y, 0, by)
        return True

    def lookup(self, node: Node) -> bool:
        """`x[p]` is x, permuted; a permuted value looked up with the inverse of p is x again."""
        parts = _lookup_parts(node)
        if parts is None:
            return False
        x, dim, index = parts
        if index in self.inverse and x in self.permuted:
            before = self.permuted[x]
            if (before.by, before.dim) == (self.inverse[index], dim):
                self.values[node] = before.rows
                return True
        if index not in self.permuted or x in self.permuted:
            return False
        order = self.permuted[index]
        self.permuted[node] = Permuted(self._taken(node, x, dim, order.rows), dim, order.by)
        return True

    def put(self, node: Node) -> bool:
        """Permuted rows that are put where the order says are in their first order again."""
        parts = _put_parts(node)
        if parts is None or parts.index not in self.permuted:
            return False
        order, by = self.permuted[parts.index].rows, self.permuted[parts.index].by
        if parts.value in self.permuted:
            value = self.permuted[parts.value]
            if (value.by, value.dim) != (by, parts.dim):
                return False
            if parts.adds:
                self.values[node] = self._added(node, parts, order, value.rows)
                return True
            if _is_places(order):
                self.values[node] = value.rows
                return True
        elif not parts.adds and _is_places(order) and _is_places(parts.value):
            self.values[node], self.inverse[node] = self.value(parts.value), by
            return True
        return False

    def _taken(self, node: Node, x: Node, dim: int, index: Node) -> Node:
        """`x[index]` along a dim; as an expansion where the index is known to repeat x."""
        shape, value = x.tensor.shape, self.value(x)
        times = _repetition(index, shape[dim])
        if times is None:
            return self.call(node, aten.index.Tensor, value, (*[None] * dim, index))
        count, at = times
        if count == 1:
            return value
        place = dim + at
        wide = (*shape[:place], count, *shape[place:])
        single = self.call(node, aten.unsqueeze.default, value, place)
        expanded = self.call(node, aten.expand.default, single, wide)
        found = self.call(node, aten.view.default, expanded, node.tensor.shape)
        if (dim, at, len(shape)) == (0, 1, 2):
            self.repeated[found] = value
        return found

    def _added(self, node: Node, parts: _Put, index: Node, value: Node) -> Node:
        """`x.index_add(dim, index, value)`; as a sum where the index is known to repeat x."""
        shape, dim, x = node.tensor.shape, parts.dim, self.value(parts.x)
        times = _repetition(index, shape[dim])
        if times is None or not value.tensor.dtype.is_floating_point:
            return self.call(node, aten.index_add.default, x, dim, index, value)
        count, at = times
        if count > 1:
            place = dim + at
            wide = (*shape[:place], count, *shape[place:])
            value = self.call(node, aten.view.default, value, wide)
            value = self.call(node, aten.sum.dim_IntList, value, (place,))
        if makes_zeros(parts.x.op, parts.x.args):
            return value
        return self.call(node, aten.add.Tensor, x, value)


def _operands(node: Node) -> enumerate[Node]:
    """The operands with their numbers, as rules count them."""
    return enumerate(call_operands(node.args, node.kwargs))


def _matrix(group: Node) -> Node:
    """The matrix of numbers that a vector of them, or a column, is a view of."""
    before: Node = group
    while before.op in (aten.view.default, aten.unsqueeze.default):
        before = before.args[0]
        if len(before.tensor.shape) == 2:
            return before
    return group


def _is_places(node: Node) -> bool:
    """Whether a vector is 0, 1, 2, ..."""
    if not is_vector(node) or _is_range(node):
        return is_vector(node)
    values = constant(node)
    return values is not None and torch.equal(values, torch.arange(len(values), dtype=values.dtype))


def _is_range(node: Node) -> bool:
    """Whether a vector is made as 0, 1, 2, ..., of any length: its values are not worked out."""
    if node.tensor.dtype not in (torch.int64, torch.int32) or node.op not in _RANGES:
        return False
    start, stop, step = {1: (0, *node.args, 1), 2: (*node.args, 1), 3: node.args}[len(node.args)]
    return (start, stop, step) == (0, node.tensor.shape[0], 1)


def _repetition(index: Node, size: int) -> tuple[int, int] | None:
    """For an index that takes each of `size` elements equally often: how often, and whether the
    copies of each stand together (1) or all elements come in turn (0)."""
    length = index.tensor.shape[0]
    if size == 0 or length == 0 or length % size:
        return None
    count = length // size
    if _is_range(index):
        return (1, 1) if count == 1 else None
    number = index.args[1] if len(index.args) > 1 and _is_range_of(index.args[0]) else None
    if index.op == aten.floor_divide.default and number == count:
        return count, 1
    if index.op == aten.remainder.Scalar and number == size:
        return count, 0
    values = constant(index)
    if values is None:
        return None
    places = torch.arange(length)
    if torch.equal(values.long(), places // count):
        return count, 1
    return (count, 0) if torch.equal(values.long(), places % size) else None


_RANGES = (aten.arange.default, aten.arange.start, aten.arange.start_step)


def _is_range_of(value: Arg) -> bool:
    return isinstance(value, Node) and is_vector(value) and _is_range(value)


def _lookup_parts(node: Node) -> tuple[Node, int, Node] | None:
    """`x`, dim and vector of a lookup of whole slices of x, however it is written."""
    x: Node = node.args[0]
    if node.op == aten.index.Tensor:
        single = _single(node.args[1])
        return None if single is None else (x, *single)
    if node.op == aten.take.default:
        return (x, 0, node.args[1]) if is_vector(x) and is_vector(node.args[1]) else None
    dim, index = node.args[1] % len(x.tensor.shape), node.args[2]
    if node.op == aten.gather.default:
        index = _broadcast_vector(index, dim, x.tensor.shape)
    return None if index is None else (x, dim, index)


def _single(indices: Arg) -> tuple[int, Node] | None:
    given = [(i, index) for i, index in enumerate(indices) if index is not None]
    return given[0] if len(given) == 1 and is_vector(given[0][1]) else None


def _broadcast_vector(index: Node, dim: int, shape: tuple[int, ...]) -> Node | None:
    """The vector that an index repeats over every dim of a tensor but one."""
    size = index.tensor.shape[dim]
    if index.tensor.shape != (*shape[:dim], size, *shape[dim + 1 :]):
        return None
    if index.op in (aten.expand.default, aten.repeat.default):
        index = index.args[0]
    alone = tuple(size if i == dim else 1 for i in range(len(shape)))
    if index.tensor.shape != alone:
        return None
    while not is_vector(index) and index.op in (aten.unsqueeze.default, aten.view.default):
        index = index.args[0]
    return index if index.tensor.shape == (size,) else None


@dataclass(frozen=True, slots=True)
class _Put:
    """Slices `value` written into `x` along `dim` at the places in a vector, or added there."""

    x: Node
    dim: int
    index: Node
    value: Node
    adds: bool


def _put_parts(node: Node) -> _Put | None:
    x: Node = node.args[0]
    single: tuple[int, Node] | None
    if node.op == aten.index_put.default:
        _, indices, value, adds = (*node.args, False)[:4]
        single = _single(indices)
    else:
        _, dim, index, value = node.args
        single = _slices(node, dim % len(x.tensor.shape), index, value)
        adds = node.op in _ADDING
    if single is None:
        return None
    dim, vector = single
    shape, size = x.tensor.shape, vector.tensor.shape[0]
    whole = value.tensor.shape == (*shape[:dim], size, *shape[dim + 1 :])
    return _Put(x, dim, vector, value, adds) if whole and (adds or size == shape[dim]) else None


def _slices(node: Node, dim: int, index: Node, value: Node) -> tuple[int, Node] | None:
    """Dim and index vector of an operator that puts whole slices, not scaled."""
    vector: Node | None = index
    if node.op in (aten.scatter.src, aten.scatter_add.default):
        same = index.tensor.shape == value.tensor.shape
        vector = _broadcast_vector(index, dim, node.tensor.shape) if same else None
    return None if vector is None or node.kwargs.get("alpha", 1) != 1 else (dim, vector)


_ADDING = (aten.index_add.default, aten.scatter_add.default)

_HANDLERS: dict[Op, Callable[[_Router, Node], bool]] = {
    GETITEM: _Router.item,
    aten.bucketize.Tensor: _Router.groups,
    GroupedMM.op: _Router.product,
    **dict.fromkeys((*SORTS, *ARGSORTS), _Router.sort),
    **dict.fromkeys(
        (
            aten.index.Tensor, aten.index_select.default, aten.gather.default, aten.take.default,
        ),
        _Router.lookup,
    ),
    **dict.fromkeys(
        (
            aten.index_put.default, aten.index_copy.default, aten.scatter.src, *_ADDING,
        ),
        _Router.put,
    ),
}  # fmt: skip
"""What carries permutations through an operator; where it returns False, the rule decides."""

"""Write lookups and writes by index in the operators whose rules keep a batch split.

Before:  arange: i64[8]    = arange(8)
         index: f32[8, 16] = index(linear, [arange, last])
After:   view: i64[8, 1, 1]    = view(where, [8, 1, 1])
         expand: i64[8, 1, 16] = expand(view, [8, 1, 16])
         gather: f32[8, 1, 16] = gather(linear, 1, expand)
         view_1: f32[8, 16]    = view(gather, [8, 16])

An index that counts along a dim (`x[arange(b), last]`) looks nothing up there: each element takes
its own. What is left is a `gather`, whose other dims may be split. `take`, `take_along_dim`, bags
of one size and means of scattered rows are such operators in disguise too.
Requires: a captured graph. Ensures: the same values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from meshwright.compiler.graph.ir import GETITEM, Graph, Node
from meshwright.compiler.placing.rules.factories import makes_zeros
from meshwright.passes.rewriting.recognise import constant, counts_along
from meshwright.passes.rewriting.rewriter import Rewriter, rewrite_operators

aten = torch.ops.aten


def lookups(graph: Graph) -> Graph:
    """The graph with every lookup and write by index in its narrowest form."""
    return rewrite_operators(graph, _REWRITES)


@dataclass(frozen=True, slots=True)
class _Counted:
    """`x[indices]` of which one index looks up `dim` and each other counts along its dim.

    `axes` are, by counted dim, the axes of the broadcast indices along which it counts; `others`
    the rest of those axes, and `sizes` the sizes of all.
    """

    dim: int
    index: Node
    axes: dict[int, int]
    sizes: tuple[int, ...]

    @property
    def others(self) -> tuple[int, ...]:
        return tuple(a for a in range(len(self.sizes)) if a not in self.axes.values())

    @property
    def looked_up(self) -> int:
        """How many elements are looked up for each of those counted."""
        return math.prod(self.sizes[axis] for axis in self.others)

    def rest(self, rank: int) -> tuple[int, ...]:
        """The dims of x that have no index."""
        return tuple(i for i in range(rank) if i != self.dim and i not in self.axes)

    def order(self, rank: int) -> tuple[int, ...]:
        """The dims of x: counted, looked up, the rest."""
        return (*self.axes, self.dim, *self.rest(rank))

    def result_order(self, rank: int) -> tuple[int, ...]:
        """By dim of the result, its place among: counted axes, the other axes, the rest."""
        ahead = [*self.axes.values(), *self.others]
        places = [ahead.index(axis) for axis in range(len(self.sizes))]
        rest = [len(ahead) + i for i in range(len(self.rest(rank)))]
        spoken = sorted((self.dim, *self.axes))
        # Neighbouring indices put their dims in the place of the first; others put them in front.
        front = spoken[0] if spoken[-1] - spoken[0] == len(spoken) - 1 else 0
        return (*rest[:front], *places, *rest[front:])


def _counted(x: Node, indices: Sequence[Node | None]) -> _Counted | None:
    given = {i: index for i, index in enumerate(indices) if index is not None}
    if len(given) < 2 or any(
        n.tensor.dtype not in (torch.int64, torch.int32) for n in given.values()
    ):
        return None
    shapes = (index.tensor.shape for index in given.values())
    sizes = torch.broadcast_shapes(*shapes)  # type: ignore[no-untyped-call]
    axes: dict[int, int] = {}
    for dim, index in given.items():
        axis = counts_along(index, x.tensor.shape[dim], len(sizes))
        if axis is not None and axis not in axes.values():
            axes[dim] = axis
    looked = [dim for dim in given if dim not in axes]
    if len(looked) != 1 or not axes:
        return None
    return _Counted(looked[0], given[looked[0]], axes, tuple(sizes))


def _index(rewriter: Rewriter) -> Node | None:
    """`x[arange(b), i]`: a gather."""
    x, indices = rewriter.args
    found = _counted(x, indices)
    if found is None:
        return None
    rank = len(x.tensor.shape)
    x = _permuted(rewriter, x, found.order(rank))
    index = _gather_index(rewriter, found, x)
    taken = rewriter.call(aten.gather.default, x, len(found.axes), index)
    sizes = [found.sizes[axis] for axis in (*found.axes.values(), *found.others)]
    taken = rewriter.view(taken, (*sizes, *x.tensor.shape[len(found.axes) + 1 :]))
    return _permuted(rewriter, taken, found.result_order(rank))


def _index_put(rewriter: Rewriter) -> Node | None:
    """`x[arange(b), i] = value`: a scatter."""
    x, indices, value = rewriter.args[:3]
    found = _counted(x, indices)
    rank = len(x.tensor.shape)
    # Behind a view or a permutation, zeros would not be recognised as such.
    if found is None or found.order(rank) != tuple(range(rank)):
        return None
    index = _gather_index(rewriter, found, x)
    order = found.result_order(rank)
    ahead = [found.sizes[axis] for axis in (*found.axes.values(), *found.others)]
    ordered = [*ahead, *x.tensor.shape[len(found.axes) + 1 :]]
    value = _expanded(rewriter, value, tuple(ordered[place] for place in order))
    value = _permuted(rewriter, value, tuple(order.index(i) for i in range(len(order))))
    value = rewriter.view(value, index.tensor.shape)
    op = aten.scatter_add.default if rewriter.option(3, "accumulate", False) else aten.scatter.src
    return rewriter.call(op, x, len(found.axes), index, value)


def _gather_index(rewriter: Rewriter, found: _Counted, x: Node) -> Node:
    """The index of a gather from x, whose dims are counted, looked up, the rest."""
    index, place = found.index, len(found.axes)
    size = x.tensor.shape[place]
    if index.tensor.dtype != torch.int64:
        index = rewriter.call(aten._to_copy.default, index, dtype=torch.int64)
    index = _from_the_start(rewriter, index, size)
    shape = index.tensor.shape
    index = rewriter.view(index, (*[1] * (len(found.sizes) - len(shape)), *shape))
    index = _expanded(rewriter, index, found.sizes)
    index = _permuted(rewriter, index, (*found.axes.values(), *found.others))
    counted, rest = x.tensor.shape[:place], x.tensor.shape[place + 1 :]
    index = rewriter.view(index, (*counted, found.looked_up, *[1] * len(rest)))
    return _expanded(rewriter, index, (*counted, found.looked_up, *rest))


def _from_the_start(rewriter: Rewriter, index: Node, size: int) -> Node:
    """An index whose negative entries count from the end, which `gather` refuses, without any."""
    below = rewriter.call(aten.lt.Scalar, index, 0)
    wrapped = rewriter.call(aten.add.Tensor, index, size)
    return rewriter.call(aten.where.self, below, wrapped, index)


def _take(rewriter: Rewriter) -> Node:
    """`take(x, index)`: a lookup in x as a vector."""
    x, index = rewriter.args
    return rewriter.call(aten.index.Tensor, rewriter.view(x, (-1,)), [index])


def _put(rewriter: Rewriter) -> Node:
    """`put(x, index, source)`: a write to x as a vector."""
    x, index, source = rewriter.args[:3]
    flat, index, source = (rewriter.view(each, (-1,)) for each in (x, index, source))
    accumulate = rewriter.option(3, "accumulate", False)
    found = rewriter.call(aten.index_put.default, flat, [index], source, accumulate)
    return rewriter.view(found, x.tensor.shape)


def _take_along(rewriter: Rewriter) -> Node:
    """`take_along_dim(x, index, dim)`: a gather, the other dims broadcast."""
    x, index = rewriter.args[:2]
    dim = rewriter.option(2, "dim")
    if dim is None:
        x, index, dim = rewriter.view(x, (-1,)), rewriter.view(index, (-1,)), 0
    dim %= len(x.tensor.shape)
    pairs = list(zip(x.tensor.shape, index.tensor.shape, strict=True))
    shape = [max(a, b) if 0 not in (a, b) else 0 for a, b in pairs]
    for_x = [pairs[dim][0] if i == dim else size for i, size in enumerate(shape)]
    for_index = [pairs[dim][1] if i == dim else size for i, size in enumerate(shape)]
    x = _expanded(rewriter, x, tuple(for_x))
    index = _from_the_start(rewriter, index, pairs[dim][0])
    index = _expanded(rewriter, index, tuple(for_index))
    return rewriter.call(aten.gather.default, x, dim, index)


def _scatter_reduce(rewriter: Rewriter) -> Node | None:
    """Sums and means of scattered values: sums over counts."""
    x, dim, index, source, how = rewriter.args[:5]
    included = rewriter.option(5, "include_self", True)
    if how == "sum" and included:
        return rewriter.call(aten.scatter_add.default, x, dim, index, source)
    if how not in ("sum", "mean") or not x.tensor.dtype.is_floating_point:
        return None
    dtype = x.tensor.dtype
    ones = rewriter.call(aten.full.default, list(index.tensor.shape), 1, dtype=dtype)
    none = rewriter.call(aten.full.default, list(x.tensor.shape), 0, dtype=dtype)
    count = rewriter.call(aten.scatter_add.default, none, dim, index, ones)
    if not included and not makes_zeros(x.op, x.args):
        hit = rewriter.call(aten.gt.Scalar, count, 0)
        x = rewriter.call(aten.masked_fill.Scalar, x, hit, 0)
    total = rewriter.call(aten.scatter_add.default, x, dim, index, source)
    if how == "sum":
        return total
    if included:
        count = rewriter.call(aten.add.Tensor, count, 1)
    else:
        count = rewriter.call(aten.clamp.default, count, 1)
    return rewriter.call(aten.div.Tensor, total, count)


def _bag(rewriter: Rewriter) -> Node | None:
    """The first result of `embedding_bag`, where all bags are of one size: rows, reduced."""
    bag, place = rewriter.args
    if bag.op != aten.embedding_bag.padding_idx or place != 0:
        return None
    weight, index, offsets, by_frequency, mode, sparse, scale, last, padding = bag.args
    padding = -1 if padding is None else padding
    size = _bag_size(index, offsets, last)
    if size is None or by_frequency or sparse or (mode == 2 and padding >= 0):
        return None
    count = index.tensor.shape[0] // size
    index = rewriter.view(index, (count, size))
    rows = rewriter.call(aten.embedding.default, weight, index)
    if mode == 2:
        return _largest(rewriter, rows)
    share = None if scale is None else rewriter.view(scale, (count, size))
    number: Node | int = size
    if padding >= 0:
        kept = rewriter.call(aten.ne.Scalar, index, padding)
        kept = rewriter.call(aten._to_copy.default, kept, dtype=weight.tensor.dtype)
        share = kept if share is None else rewriter.call(aten.mul.Tensor, share, kept)
        number = rewriter.call(aten.sum.dim_IntList, kept, [1], True)
        number = rewriter.call(aten.clamp.default, number, 1)
    if share is not None:
        rows = rewriter.call(aten.mul.Tensor, rows, rewriter.view(share, (count, size, 1)))
    total = rewriter.call(aten.sum.dim_IntList, rows, [1])
    return total if mode == 0 else rewriter.call(aten.div.Tensor, total, number)


def _largest(rewriter: Rewriter, rows: Node) -> Node:
    """The largest value of each feature in each bag."""
    found = rewriter.call(aten.max.dim, rows, 1)
    assert isinstance(found.type, tuple)
    return rewriter.call(GETITEM, found, 0, type=found.type[0])


def _bag_size(index: Node, offsets: Node, last: bool) -> int | None:
    """The size of all bags, if it is the same."""
    starts = constant(offsets)
    total = index.tensor.shape[0]
    if starts is None or len(index.tensor.shape) != 1:
        return None
    count = len(starts) - int(last)
    if count < 1 or total == 0 or total % count:
        return None
    even = torch.arange(len(starts)) * (total // count)
    return total // count if torch.equal(starts, even) else None


def _expanded(rewriter: Rewriter, x: Node, shape: tuple[int, ...]) -> Node:
    return x if x.tensor.shape == shape else rewriter.call(aten.expand.default, x, list(shape))


def _permuted(rewriter: Rewriter, x: Node, order: tuple[int, ...]) -> Node:
    if order == tuple(range(len(order))):
        return x
    return rewriter.call(aten.permute.default, x, list(order))


_REWRITES = {
    aten.index.Tensor: _index,
    aten.index_put.default: _index_put,
    aten.take.default: _take,
    aten.put.default: _put,
    aten.take_along_dim.default: _take_along,
    aten.scatter_reduce.two: _scatter_reduce,
    GETITEM: _bag,
}

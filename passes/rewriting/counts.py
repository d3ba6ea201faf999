"""Recognise how models count what is in each group, and where the groups of sorted rows end.

Mixtures of experts write it as `cumsum(histc(ids))`, with a sum of one-hot rows or a scatter of
ones instead of the histogram. Rows in the order of their groups then have the groups `sort(ids)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from meshwright.compiler.graph.ir import GETITEM, Arg, MeshOp, Node, Op, TensorType, map_nodes
from meshwright.compiler.placing.rules.factories import makes_zeros
from meshwright.compiler.placing.rules.notation import dim_index
from meshwright.passes.rewriting.recognise import constant

aten = torch.ops.aten

SORTS = (aten.sort.default, aten.sort.stable)
ARGSORTS = (aten.argsort.default, aten.argsort.stable)

_RESHAPING = {
    aten.view.default, aten.unsqueeze.default, aten.squeeze.dim, aten.clone.default,
    aten._to_copy.default, aten.transpose.int, aten.permute.default, aten.t.default,
    aten.detach.default,
}  # fmt: skip
"""Operators that keep every element, in any order."""

_CHOOSING = {
    aten.slice.Tensor, aten.select.int, aten.expand.default, aten.index.Tensor,
    aten.gather.default, aten.repeat_interleave.self_int, aten.index_select.default,
}  # fmt: skip
"""Operators whose result has only elements of their first operand."""

_ONES = {aten.ones.default, aten.ones_like.default, aten.new_ones.default}
_FULL = {aten.full.default: 1, aten.full_like.default: 1, aten.new_full.default: 2}


def option(node: Node, name: str) -> Arg:
    """An argument of a call, given by position or by name, or its default; None where the operator
    has none of that name."""
    assert not isinstance(node.op, MeshOp)
    for place, argument in enumerate(node.op._schema.arguments):
        if argument.name == name and place < len(node.args):
            return node.args[place]
        if argument.name == name:
            return node.kwargs.get(name, argument.default_value)
    return None


def source(node: Node) -> Node | None:
    """The value whose elements an integer tensor holds, each once, in any order; None if any of
    them may have been rounded on the way."""
    while True:
        before = _before(node)
        if before is None:
            return node if _is_integer(node) else None
        node = before


def same_value(a: Node, b: Node) -> bool:
    """Whether two values are the same part of one tensor, as far as their operators show."""
    if a is b:
        return True
    if a.op != b.op or a.op not in _RESHAPING | _CHOOSING | {GETITEM} or a.type != b.type:
        return False
    pairs = zip(a.operands(), b.operands(), strict=True)
    plain = [map_nodes((n.args, tuple(n.kwargs.items())), lambda _: None) for n in (a, b)]
    return plain[0] == plain[1] and all(same_value(x, y) for x, y in pairs)


def _before(node: Node) -> Node | None:
    found: Node | None = None
    if node.op in _RESHAPING:
        found = node.args[0]
    elif node.op == GETITEM and node.args[0].op in SORTS and node.args[1] == 0:
        found = node.args[0].args[0]
    elif node.op == aten.index.Tensor and _is_permuted(node):
        found = node.args[0]
    return found


def _is_permuted(node: Node) -> bool:
    """Whether a lookup takes every element of a vector once, in the order of a sort."""
    x, (index, *_) = node.args
    whole = len(x.tensor.shape) == 1 and index.tensor.shape == x.tensor.shape
    sort = index.args[0] if index.op == GETITEM and index.args[1] == 1 else index
    return whole and sort.op in (*SORTS, *ARGSORTS) and len(sort.args[0].tensor.shape) == 1


def _is_integer(node: Node) -> bool:
    type = node.type
    return isinstance(type, TensorType) and type.dtype in (torch.int64, torch.int32)


def grouped_by(ends: Node) -> Node | None:
    """For the running total of the sizes of groups: the number of each element's group, in any
    order. None of them is negative; those past the last group are not counted."""
    ends = _uncast(ends)
    if ends.op != aten.cumsum.default or len(ends.tensor.shape) != 1:
        return None
    found = _counts(_uncast(ends.args[0]))
    if found is None:
        return None
    ids = source(found.elements)
    if ids is None:
        return None
    low, high = interval(ids)
    return ids if low >= 0 and (found.ignores_others or high < ends.tensor.shape[0]) else None


@dataclass(frozen=True, slots=True)
class _Counts:
    """The elements that a vector counts: its entry i is how many of them are i."""

    elements: Node
    ignores_others: bool
    """Whether elements without an entry are left out; otherwise they are an error."""


def _uncast(node: Node) -> Node:
    while node.op == aten._to_copy.default:
        node = node.args[0]
    return node


def _counts(node: Node) -> _Counts | None:
    form = _FORMS.get(node.op)
    return form(node, *node.tensor.shape) if form and len(node.tensor.shape) == 1 else None


def _histogram(node: Node, count: int) -> _Counts | None:
    """One bin per integer, from 0 to the largest, or to one more, which shares the last bin."""
    bins, low, high = (option(node, name) for name in ("bins", "min", "max"))
    if (bins, low) != (count, 0) or high not in (count - 1, count):
        return None
    return _Counts(node.args[0], ignores_others=high == count - 1)


def _summed(node: Node, count: int) -> _Counts | None:
    """A sum of one-hot rows, made by `one_hot` or by comparing with every number."""
    hot = _uncast(node.args[0])
    dims = {d % len(hot.tensor.shape) for d in node.args[1] or ()}
    if dims != set(range(len(hot.tensor.shape) - 1)):
        return None
    if hot.op == aten.one_hot.default:
        return _Counts(hot.args[0], ignores_others=False)
    if hot.op != aten.eq.Tensor:
        return None
    ids, numbers = hot.args
    values = constant(numbers)
    every = values is not None and torch.equal(values.reshape(-1), torch.arange(count))
    column = ids.tensor.shape[-1:] == (1,) and ids.tensor.shape[:-1] == hot.tensor.shape[:-1]
    return _Counts(ids, ignores_others=True) if every and column else None


def _scattered(node: Node, count: int) -> _Counts | None:
    """Ones added to zeros."""
    zeros, index, ones = _added_parts(node)
    if not makes_zeros(zeros.op, zeros.args) or not isinstance(index, Node) or not _is_one(ones):
        return None
    same = index.tensor.shape == ones.tensor.shape
    return _Counts(index, ignores_others=False) if same else None


def _added_parts(node: Node) -> tuple[Node, Arg, Node]:
    if node.op == aten.index_put.default:
        zeros, indices, ones, accumulate = (*node.args, False)[:4]
        return zeros, indices[0] if accumulate and len(indices) == 1 else None, ones
    zeros, _, index, ones = node.args[:4]
    return zeros, None if node.kwargs.get("alpha", 1) != 1 else index, ones


def _is_one(node: Node) -> bool:
    node = _uncast(node)
    while node.op == aten.expand.default:
        node = node.args[0]
    return node.op in _ONES or (node.op in _FULL and node.args[_FULL[node.op]] == 1)


_FORMS: dict[Op, Callable[[Node, int], _Counts | None]] = {
    aten.histc.default: _histogram,
    aten.sum.dim_IntList: _summed,
    aten.scatter_add.default: _scattered,
    aten.index_add.default: _scattered,
    aten.index_put.default: _scattered,
}


def interval(node: Arg) -> tuple[float, float]:
    """The least and the largest that the elements of an integer tensor, or a number, can be."""
    if not isinstance(node, Node):
        return (node, node) if isinstance(node, (int, float)) else (-math.inf, math.inf)
    if not _is_integer(node):
        return -math.inf, math.inf
    if node.op in _RESHAPING | _CHOOSING:
        return interval(node.args[0])
    if node.op in _BOUNDS:
        return _BOUNDS[node.op](node)
    size = _num_places(node)
    return (-math.inf, math.inf) if size is None else (0, size - 1)


def _union(*values: Arg) -> tuple[float, float]:
    lows, highs = zip(*map(interval, values), strict=True)
    return min(lows), max(highs)


def _clamped(node: Node) -> tuple[float, float]:
    low, high = option(node, "min"), option(node, "max")
    least, largest = interval(node.args[0])
    if isinstance(low, int):
        least, largest = max(least, low), max(largest, low)
    if isinstance(high, int):
        least, largest = min(least, high), min(largest, high)
    return least, largest


def _remainder(node: Node) -> tuple[float, float]:
    divisor = node.args[1]
    positive = isinstance(divisor, int) and divisor > 0
    return (0, divisor - 1) if positive else (-math.inf, math.inf)


_BOUNDS: dict[Op, Callable[[Node], tuple[float, float]]] = {
    aten.remainder.Scalar: _remainder,
    aten.clamp.default: _clamped,
    aten.clamp_min.default: _clamped,
    aten.cat.default: lambda node: _union(*node.args[0]),
    aten.stack.default: lambda node: _union(*node.args[0]),
    aten.where.self: lambda node: _union(*node.args[1:3]),
    aten.where.ScalarOther: lambda node: _union(*node.args[1:3]),
    aten.where.ScalarSelf: lambda node: _union(*node.args[1:3]),
    aten.masked_fill.Scalar: lambda node: _union(node.args[0], node.args[2]),
    aten.abs.default: lambda node: (0, math.inf),
    aten.full.default: lambda node: interval(node.args[1]),
    aten.scalar_tensor.default: lambda node: interval(node.args[0]),
}
"""The bounds of the elements of results."""


def _num_places(node: Node) -> int | None:
    """The size of the dim that the elements of an integer tensor are places in, if they are."""
    finder: Node = node.args[0] if node.op == GETITEM and node.args[1] == 1 else node
    if finder.op not in _FINDING:
        return None
    dim, shape = option(finder, "dim"), finder.args[0].tensor.shape
    size: int = math.prod(shape) if dim is None else shape[dim_index(dim, len(shape))]
    return size


_FINDING: set[Op] = {
    aten.topk.default, aten.max.dim, aten.min.dim, aten.argmax.default, aten.argmin.default,
    *SORTS, *ARGSORTS,
}  # fmt: skip
"""Operators that give places in a dim."""

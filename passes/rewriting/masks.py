"""Write assignments under masks as `where`, whose shapes and splits do not depend on the mask.

Before:  lt: bool[8, 16]       = lt(mul, 0)
         index_put: f32[8, 16] = index_put(mul, [lt], lifted_tensor_0)
After:   lt: bool[8, 16]   = lt(mul, 0)
         where: f32[8, 16] = where(lt, lifted_tensor_0, mul)

`x[mask] = value` and `index_fill` say which elements to replace. Where all of them get one value,
or one row, that is a choice element by element. Where each gets a row of its own and the mask is
known beforehand, the row's number is how many elements before it are true.
Requires: a captured graph. Ensures: the same values; no index is a mask.
Elsewhere: XLA, where no shape may depend on a value.
"""

from __future__ import annotations

import math

import torch

from meshwright.compiler.errors import CaptureError
from meshwright.compiler.graph.ir import Graph, Node
from meshwright.passes.rewriting.rewriter import Rewriter, rewrite_operators

aten = torch.ops.aten

_MASKS = (torch.bool, torch.uint8)


def masks(graph: Graph) -> Graph:
    """The graph without assignments under masks."""
    return rewrite_operators(graph, _REWRITES)


def _assign(rewriter: Rewriter) -> Node | None:
    """`x[..., mask, ...] = value`."""
    x, indices, value = rewriter.args[:3]
    given = [(i, index) for i, index in enumerate(indices) if index is not None]
    if all(index.tensor.dtype not in _MASKS for _, index in given):
        return None
    if len(given) > 1:
        raise _refused(rewriter.node, "indexes with a mask and another index at once")
    ((first, mask),) = given
    if mask.tensor.dtype == torch.uint8:
        mask = rewriter.call(aten._to_copy.default, mask, dtype=torch.bool)
    chosen = len(mask.tensor.shape)
    after = x.tensor.shape[first + chosen :]
    over = rewriter.view(mask, (*mask.tensor.shape, *[1] * len(after)))
    shape = value.tensor.shape
    place = len(shape) - 1 - len(after)
    if place >= 0 and shape[place] != 1:
        return _rows(rewriter, x, mask, over, place)
    if place >= 0:
        value = rewriter.view(value, (*shape[:place], *[1] * chosen, *shape[place + 1 :]))
    if rewriter.option(3, "accumulate", False):
        value = rewriter.call(aten.add.Tensor, x, value)
    return rewriter.call(aten.where.self, over, value, x)


def _rows(rewriter: Rewriter, x: Node, mask: Node, over: Node, place: int) -> Node:
    """`x[mask] = rows`, one row for each true element of a mask that is known beforehand."""
    accumulates = rewriter.option(3, "accumulate", False)
    if not mask.of_model or accumulates:
        raise _refused(rewriter.node, "writes one row for each true element of a mask")
    value: Node = rewriter.args[2]
    shape = value.tensor.shape
    if shape[place] == 0:
        return x
    flags = rewriter.view(mask, (math.prod(mask.tensor.shape),))
    chosen = rewriter.call(aten.index_select.default, value, place, _places(rewriter, flags))
    shape = (*shape[:place], *mask.tensor.shape, *shape[place + 1 :])
    return rewriter.call(aten.where.self, over, rewriter.view(chosen, shape), x)


def _places(rewriter: Rewriter, flags: Node) -> Node:
    """For each true flag, how many before it are true."""
    count = rewriter.call(aten.cumsum.default, flags, 0)
    return rewriter.call(aten.clamp.default, rewriter.call(aten.sub.Tensor, count, 1), 0)


def _refused(node: Node, what: str) -> CaptureError:
    return CaptureError(
        f"an assignment {what}",
        code="mask",
        culprit=node.origin.source,
        help="write it with `torch.where(mask, value, x)`, the value as large as `x`",
    )


def _fill(rewriter: Rewriter) -> Node | None:
    """`index_fill(x, dim, index, value)`: the indices become a mask of the dim."""
    x, dim, index, value = rewriter.args
    rank = len(x.tensor.shape)
    if rank == 0:
        return None
    size = x.tensor.shape[dim]
    nowhere = rewriter.call(aten.full.default, [size], False, dtype=torch.bool)
    at = rewriter.call(aten.index_fill.int_Scalar, nowhere, 0, index, True)
    at = rewriter.view(at, (size, *[1] * (rank - 1 - dim % rank)))
    if not isinstance(value, Node):
        return rewriter.call(aten.masked_fill.Scalar, x, at, value)
    if value.tensor.dtype != x.tensor.dtype:
        value = rewriter.call(aten._to_copy.default, value, dtype=x.tensor.dtype)
    return rewriter.call(aten.where.self, at, value, x)


_REWRITES = {
    aten.index_put.default: _assign,
    aten._unsafe_index_put.default: _assign,
    aten.index_fill.int_Scalar: _fill,
    aten.index_fill.int_Tensor: _fill,
}

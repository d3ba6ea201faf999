"""How far back queries see keys, where a mask says so that is known before anything runs.

A sliding window or a document ends many blocks before the first key: a ring need not bring those.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from meshwright.compiler.graph.ir import MeshOp, Node, TensorType, map_nodes
from meshwright.compiler.placing.rules.pointwise import is_pointwise
from meshwright.compiler.placing.rules.views import RESHAPES

aten = torch.ops.aten

_ALL = (aten.bitwise_and.Tensor, aten.logical_and.default, aten.__and__.Tensor, aten.mul.Tensor)
_OPTIONS = ("alpha", "dtype", "rounding_mode")
"""Of the options that operators take by name, those that change the value."""
_SMALL = 1 << 18
"""The elements of a value that is worked out whole."""
_ROWS = 1 << 22
"""The elements of a mask that are worked out at once."""
_LARGEST = 1 << 30
"""The elements of the largest mask that is looked at."""


def reach(mask: Node | None) -> int | None:
    """The most positions that a query looks back under a boolean `[..., queries, keys]`, where none
    looks ahead; None where one does, or where that is not known."""
    if mask is None or mask.tensor.dtype != torch.bool or len(mask.tensor.shape) < 2:
        return None
    queries, keys = mask.tensor.shape[-2:]
    if queries != keys or math.prod(mask.tensor.shape) > _LARGEST:
        return None
    furthest, many = 0, max(1, _ROWS // keys)
    known = _Known(queries)
    for first in range(0, queries, many):
        found = known.bound(mask, slice(first, min(first + many, queries)))
        if found is None:
            return None
        seen = found.flatten(0, -3).any(0) if found.dim() > 2 else found
        here = torch.arange(first, first + len(seen))
        if seen.triu(first + 1).any():
            return None
        looks = seen.any(-1)
        back = (here - seen.int().argmax(-1))[looks]
        furthest = max(furthest, int(back.max()) if len(back) else 0)
    return furthest


class _Known:
    """Values that depend on no input, and some of the `rows` of those with that many in the last
    dim but one."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.whole: dict[Node, Tensor | None] = {}

    def bound(self, node: Node, rows: slice) -> Tensor | None:
        """A mask that is true wherever `node` is; what is not known may be true."""
        if node.op in _ALL and node.tensor.dtype == torch.bool:
            first, second = (self.bound(each, rows) for each in node.args[:2])
            known = [each for each in (first, second) if each is not None]
            return known[0] if len(known) == 1 else (known[0] & known[1] if known else None)
        found = self.value(node, rows)
        if found is None and (node.op in RESHAPES or node.op == aten.expand.default):
            return self._spread(node, self.bound(node.args[0], rows), rows)
        return found

    def value(self, node: Node, rows: slice) -> Tensor | None:
        """The value of some rows, if it is known."""
        shape = node.tensor.shape
        if math.prod(shape) <= _SMALL:
            if node not in self.whole:
                self.whole[node] = self._run(node, slice(0, self.rows))
            found = self.whole[node]
            return found if found is None else self._cut(found, rows)
        if node.op in RESHAPES or node.op == aten.expand.default:
            return self._spread(node, self.value(node.args[0], rows), rows)
        return self._run(node, rows) if is_pointwise(node.op) else None

    def _spread(self, node: Node, x: Tensor | None, rows: slice) -> Tensor | None:
        """A view of a known value, which keeps its rows."""
        if x is None:
            return None
        shape = list(node.tensor.shape)
        if len(shape) > 1 and shape[-2] == self.rows:
            shape[-2] = rows.stop - rows.start
        if node.op == aten.expand.default:
            return x.expand(shape)
        same = node.args[0].tensor.shape[-2:] == node.tensor.shape[-2:]
        return x.reshape(shape) if same else None

    def _cut(self, x: Tensor, rows: slice) -> Tensor:
        return x[..., rows, :] if x.dim() > 1 and x.shape[-2] == self.rows else x

    def _run(self, node: Node, rows: slice) -> Tensor | None:
        if isinstance(node.op, MeshOp):
            return None
        if (
            not isinstance(node.type, TensorType)
            or torch.Tag.nondeterministic_seeded in node.op.tags
        ):
            return None
        values = {each: self.value(each, rows) for each in node.operands()}
        if any(value is None for value in values.values()):
            return None
        args = map_nodes(node.args, values.__getitem__)
        options = {key: value for key, value in node.kwargs.items() if key in _OPTIONS}
        found: Tensor = node.op(*args, **options)
        return found

"""Recognise what models spell out in general operators and a narrower operator could split."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from meshwright.compiler.graph.ir import Node, TensorType

aten = torch.ops.aten

_CONSTANT = {
    aten.arange.default, aten.arange.start, aten.arange.start_step, aten.unsqueeze.default,
    aten.view.default, aten.squeeze.dim, aten.add.Tensor, aten.mul.Tensor, aten.sub.Tensor,
    aten._to_copy.default, aten.slice.Tensor, aten.expand.default, aten.permute.default,
    aten.transpose.int, aten.clone.default, aten.floor_divide.default, aten.remainder.Scalar,
    aten.div.Tensor_mode, aten.repeat_interleave.self_int, aten.repeat.default,
    aten.__rshift__.Scalar, aten.select.int,
}  # fmt: skip
"""Operators through which the value of an index is followed."""

_OPTIONS = ("alpha", "dtype", "rounding_mode")
"""Of the options that these operators take by name, those that change the value."""

_LONGEST = 1 << 24
"""The number of elements of the largest index that is worked out here."""


def repeated_heads(x: Node) -> Node | None:
    """`x[b, g·n, s, d]` as `[b, g, s, d]` where each head stands n times in a row, as models spell
    out grouped-query attention; None for any other value."""
    if x.op == aten.repeat_interleave.self_int and x.args[2:3] == (1,):
        found: Node = x.args[0]
        return found
    if x.op != aten.view.default or x.args[0].op != aten.expand.default:
        return None
    expanded: Node = x.args[0]
    single: Node = expanded.args[0]
    shape = expanded.tensor.shape
    if single.op != aten.unsqueeze.default or len(shape) != 5 or single.tensor.shape[2] != 1:
        return None
    heads: Node = single.args[0]
    b, groups, count, *rest = shape
    inserted = heads.tensor.shape == (b, groups, *rest)
    merged = x.tensor.shape == (b, groups * count, *rest)
    return heads if inserted and merged else None


def grid_axes(x: Node, indices: Sequence[Node | None]) -> list[int] | None:
    """For `x[indices]` that takes every element of x once, in order: the axis of the index arrays
    along which each of the looked-up dims runs. Masks of batches are written so, `m[b, t]`.

    None where it is any other lookup, or where the values of an index are not known here.
    """
    axes: list[int] = []
    rank = max(len(index.tensor.shape) for index in indices if index is not None)
    for dim, index in enumerate(indices):
        axis = None if index is None else counts_along(index, x.tensor.shape[dim], rank)
        if axis is None or axis in axes:
            return None
        axes.append(axis)
    return axes


def counts_along(index: Node, size: int, rank: int) -> int | None:
    """The axis of `rank` broadcast indices along which one is 0, 1, 2 ... up to a dim's size."""
    shape = index.tensor.shape
    along = [axis for axis, length in enumerate(shape) if length != 1]
    if len(along) != 1 or shape[along[0]] != size:
        return None
    values = constant(index)
    if values is None or not torch.equal(values.reshape(-1), torch.arange(size)):
        return None
    return along[0] + rank - len(shape)


def constant(node: Node) -> torch.Tensor | None:
    """The value of an integer tensor that depends on nothing, if it is small enough."""
    type = node.type
    if not isinstance(type, TensorType) or type.dtype not in (torch.int64, torch.int32):
        return None
    if node.op not in _CONSTANT or torch.Size(type.shape).numel() > _LONGEST:
        return None
    args: list[Any] = []
    for arg in node.args:
        value = constant(arg) if isinstance(arg, Node) else arg
        if isinstance(arg, Node) and value is None:
            return None
        args.append(value)
    options = {key: value for key, value in node.kwargs.items() if key in _OPTIONS}
    if node.op == aten.view.default:
        return torch.reshape(args[0], type.shape)
    found: torch.Tensor = node.op(*args, **options)
    return found

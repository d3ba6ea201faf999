"""Rules of operators that make tensors of a given shape, and which of them make zeros."""

from __future__ import annotations

import torch

from meshwright.compiler.graph.ir import Arg, MeshOp, Node, Op
from meshwright.compiler.placing.rules.notation import Call, Spec, numbered
from meshwright.compiler.placing.rules.registry import rule

aten = torch.ops.aten


@rule(
    aten.zeros.default,
    aten.ones.default,
    aten.full.default,
    aten.empty.memory_format,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
    aten.new_empty.default,
)
def _constant(call: Call) -> Spec:
    """The same everywhere: replicated, or split as a user asks; an operand lends its type only."""
    return _made(call, free=True)


@rule(
    aten.arange.default,
    aten.arange.start,
    aten.arange.start_step,
    aten.linspace.default,
    aten.scalar_tensor.default,
    aten.eye.default,
    aten.eye.m,
    aten.tril_indices.default,
    aten.triu_indices.default,
)
def _sequence(call: Call) -> Spec:
    """Different at each index: made whole."""
    return _made(call, free=False)


def _made(call: Call, *, free: bool) -> Spec:
    operands = tuple(("",) * len(operand.type.shape) for operand in call.operands)
    (result,) = call.results
    assert result is not None
    letters = numbered("r", len(result.shape))
    return Spec(
        operands,
        (letters,),
        ignored=frozenset(range(len(operands))),
        free=frozenset(letters) if free else frozenset(),
    )


_FILLS: dict[Op, float | int] = {
    aten.zeros.default: 0,
    aten.zero.default: 0,
    aten.new_zeros.default: 0,
    aten.zeros_like.default: 0,
    aten.ones.default: 1,
    aten.new_ones.default: 1,
    aten.ones_like.default: 1,
    aten.empty.memory_format: 0,
    aten.new_empty.default: 0,
    aten.empty_like.default: 0,
}
"""Operators whose results are one number everywhere; of memory that is not written, any will do."""
_FILLED = {
    aten.full.default: 1,
    aten.full_like.default: 1,
    aten.new_full.default: 2,
    aten.scalar_tensor.default: 0,
    aten.fill.Scalar: 1,
}
"""The argument in which other operators take that number."""


def filled_with(op: Op, args: tuple[Arg, ...]) -> float | int | None:
    """The number that every element of a call's result is, if it makes such a tensor."""
    if isinstance(op, MeshOp):
        return None
    number = args[_FILLED[op]] if op in _FILLED else _FILLS.get(op)
    return number if isinstance(number, (int, float)) else None


def makes_zeros(op: Op, args: tuple[Arg, ...]) -> bool:
    """Whether a call gives nothing but zeros, as `Operand.zero` then says."""
    return filled_with(op, args) == 0


def is_filled(value: Node) -> bool:
    """Whether all elements of a value are one number and no cotangent will reach it."""
    return not value.requires_grad and filled_with(value.op, value.args) is not None

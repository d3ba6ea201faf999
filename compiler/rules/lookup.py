"""Find the rule of an operator: a function, a row of the table, or what its kind implies."""

from __future__ import annotations

from functools import lru_cache

from meshwright.compiler import custom
from meshwright.compiler.ir import MeshOp, Op
from meshwright.compiler.rules import (
    attention,
    convolution,
    factories,
    indexing,
    products,
    reductions,
    resampling,
    slices,
    views,
)
from meshwright.compiler.rules.notation import (
    Call,
    Group,
    Placement,
    Rule,
    Spec,
    present_terms,
    row,
    tensor_arguments,
)
from meshwright.compiler.rules.pointwise import POINTWISE, is_pointwise, pointwise
from meshwright.compiler.rules.registry import FUNCTIONS
from meshwright.compiler.rules.table import TABLE

_MODULES = (
    attention,
    convolution,
    factories,
    indexing,
    products,
    reductions,
    resampling,
    slices,
    views,
)
"""Imported for the functions that they register."""


def rule_for(op: Op) -> Rule:
    """The rule of an operator; one that has none runs whole on every rank."""
    return _known(op) or _registered(op) or replicate


def has_rule(op: Op) -> bool:
    """Whether anything is known of the operator, so that it need not run whole on every rank."""
    return rule_for(op) is not replicate


@lru_cache(maxsize=4096)
def _known(op: Op) -> Rule | None:
    if op in FUNCTIONS:
        return FUNCTIONS[op]
    if op in TABLE:
        return TABLE[op]
    if op in POINTWISE:
        return POINTWISE[op]
    return pointwise(op) if is_pointwise(op) else None


def _registered(op: Op) -> Rule | None:
    if isinstance(op, MeshOp) or op not in custom.REGISTRY:
        return None
    known = custom.REGISTRY[op]
    return _as_they_are if known.num_returned else row(known.rule)


def _as_they_are(call: Call) -> tuple[Placement]:
    """The first operands are the results; the others are there for the backward alone."""
    operands = tuple(operand.layout for operand in call.operands)
    return (Placement(operands, operands[: len(call.results)]),)


def replicate(call: Call) -> Spec:
    """Everything whole on every rank; pending sums pass where torch's own backwards are linear."""
    operands = tuple(
        tuple(f"{i}.{dim}" for dim in range(len(operand.type.shape)))
        for i, operand in enumerate(call.operands)
    )
    results = tuple(
        None if type is None else tuple(f"r.{dim}" for dim in range(len(type.shape)))
        for type in call.results
    )
    whole = frozenset(letter for letters in operands for letter in letters)
    return Spec(operands, results, whole=whole, linear=_cotangents(call))


def _cotangents(call: Call) -> tuple[Group, ...]:
    """The cotangents that a `..._backward` of torch takes, in which it is linear together."""
    if isinstance(call.op, MeshOp) or not call.op._schema.name.endswith("_backward"):
        return ()
    names = [name for _, name in tensor_arguments(call.op)]
    group = (i for i, term in enumerate(present_terms(call)) if names[term].startswith("grad"))
    return (frozenset(group),)

"""Find the rule of an operator: a composite's own, a function, a row of the table, or what its kind
implies."""

from __future__ import annotations

from functools import lru_cache

from meshwright.compiler.graph import custom
from meshwright.compiler.graph.ir import MeshOp, Op
from meshwright.compiler.placing.composite import composite_of
from meshwright.compiler.placing.rules import (  # noqa: F401  # for the functions they register
    convolution,
    factories,
    indexing,
    products,
    recurrent,
    reductions,
    resampling,
    slices,
    views,
)
from meshwright.compiler.placing.rules.notation import Call, Placed, Placement, Row, Rule, replicate
from meshwright.compiler.placing.rules.pointwise import POINTWISE, is_pointwise, pointwise
from meshwright.compiler.placing.rules.registry import FUNCTIONS
from meshwright.compiler.placing.rules.table import TABLE


def rule_for(op: Op) -> Rule:
    """The rule of an operator; one that has none runs whole on every rank."""
    known = composite_of(op)
    return known.rule if known else _known(op) or _registered(op) or replicate


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
    return _as_they_are if known.num_returned else Row(known.rule)


def _as_they_are(call: Call) -> Placed:
    """The first operands are the results; the others are there for the backward alone."""
    operands = tuple(operand.layout for operand in call.operands)
    backward = frozenset(range(len(call.results), len(operands)))
    return Placed((Placement(operands, operands[: len(call.results)]),), backward)

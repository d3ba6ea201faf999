"""The placements that the rule of a call allows."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache

from meshwright.compiler.errors import LayoutError
from meshwright.compiler.layout.layout import Layout
from meshwright.compiler.layout.mesh import Mesh
from meshwright.compiler.placing.rules.lookup import rule_for
from meshwright.compiler.placing.rules.notation import Call, Placed, Placement, Spec
from meshwright.compiler.placing.rules.placements import spec_placements


@lru_cache(maxsize=65536)
def allowed(call: Call) -> tuple[Placement, ...]:
    """Every placement that the operator's rule allows, with each operand in one of its layouts or
    in others: those to which it would be brought. Their layouts are canonical."""
    found = (_canonical(each, call.mesh) for each in _placements(call))
    return tuple(dict.fromkeys(each for each in found if each is not None))


@lru_cache(maxsize=65536)
def ignored(call: Call) -> frozenset[int]:
    """The operands, by place, whose values the rule does not look at: they are taken in whatever
    layout they have. `allowed` has each in its first alone."""
    found = rule_for(call.op)(call)
    return found.ignored if isinstance(found, Spec | Placed) else frozenset()


def _placements(call: Call) -> Iterable[Placement]:
    found = rule_for(call.op)(call)
    if isinstance(found, Spec):
        return spec_placements(found, call)
    free: frozenset[int] = frozenset()
    if isinstance(found, Placed):
        free, found = found.ignored, found.placements
    own = [
        operand.layouts[:1] if i in free else operand.layouts
        for i, operand in enumerate(call.operands)
    ]
    if all(len(each) == 1 for each in own):
        return found
    return itertools.chain.from_iterable(_on(call, each) for each in itertools.product(*own))


def _on(call: Call, layouts: Iterable[Layout]) -> Iterable[Placement]:
    """The placements on operands that can be had in these layouts alone."""
    pairs = zip(call.operands, layouts, strict=True)
    operands = tuple(replace(each, layout=own, others=()) for each, own in pairs)
    return _placements(replace(call, operands=operands))


def _canonical(placement: Placement, mesh: Mesh) -> Placement | None:
    try:
        operands = tuple(layout.canonical(mesh) for layout in placement.operands)
        results = tuple(layout and layout.canonical(mesh) for layout in placement.results)
    except LayoutError:
        return None
    return Placement(operands, results)

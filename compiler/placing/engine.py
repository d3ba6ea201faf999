"""Choose how to run one call: the placement that moves the fewest bytes, forward and backward.

Each placement that the operator's rule allows is a candidate; its cost is what bringing the
operands there moves.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache
from operator import itemgetter

from meshwright.compiler.errors import LayoutError
from meshwright.compiler.layout.layout import Layout
from meshwright.compiler.layout.mesh import Mesh
from meshwright.compiler.layout.reshard import cost as reshard_cost
from meshwright.compiler.placing.rules.lookup import rule_for
from meshwright.compiler.placing.rules.notation import Call, Operand, Placement, Spec
from meshwright.compiler.placing.rules.placements import spec_placements

EXPLICIT = 1e6
"""How many times as much it costs to use a value in another layout than the plan wrote for it."""

PREFERRED = 0.5
"""What a byte counts if it brings a value to a layout that the plan asks for nearby."""

REDUNDANT = 1e-3
"""What computing one more element counts, in bytes moved: enough to break ties."""


@lru_cache(maxsize=65536)
def place(call: Call) -> Placement:
    """The cheapest way to run `call`. Raises `LayoutError` if no rule allows any."""
    priced = ((placement_cost(call, placement), placement) for placement in candidates(call))
    price, best = min(priced, key=itemgetter(0), default=(math.inf, None))
    if best is None or math.isinf(price):
        raise LayoutError(
            f"`{call.op}` cannot run on operands laid out as "
            + ", ".join(f"`{operand.layout}`" for operand in call.operands),
            help="give one of them another layout with `shard`",
        )
    return best


def candidates(call: Call) -> Iterable[Placement]:
    """Every placement that the operator's rule allows for these operands."""
    found = rule_for(call.op)(call)
    return spec_placements(found, call) if isinstance(found, Spec) else found


def placement_cost(call: Call, placement: Placement) -> float:
    """Bytes that one rank sends to bring the operands there and back; ties go to less work."""
    total = 0.0
    for operand, layout in zip(call.operands, placement.operands, strict=True):
        total += operand_cost(operand, layout, call.mesh)
        total += REDUNDANT * math.prod(layout.local_shape(call.mesh))
    for result in placement.results:
        if result is not None:
            total += REDUNDANT * math.prod(result.local_shape(call.mesh))
    return total


def operand_cost(operand: Operand, layout: Layout, mesh: Mesh) -> float:
    """Bytes to bring one operand to `layout`, its adjoint included.

    What `vary` costs in the backward does not count: reducing a parameter's gradient is the price
    of splitting the work at all, and weighing it here would undo data parallelism. Nor does the
    adjoint of slicing what is computed from parameters alone: such a slice moves to them.
    """
    layout = layout.canonical(mesh)
    if layout == operand.layout or layout in operand.available:
        return 0.0
    if operand.filled and not layout.partial and not layout.varying:
        return 0.0
    free = [axis for axis in layout.varying if operand.layout.state(axis) == "replicated"]
    moved = layout.drop_varying(free)
    try:
        price = reshard_cost(
            operand.layout,
            moved,
            operand.type.dtype.itemsize,
            mesh,
            operand.differentiable and not operand.rooted,
        )
    except LayoutError:
        return math.inf
    if layout in operand.proposals:
        price *= PREFERRED
    overridden = operand.explicit and _loses_split(operand.layout, layout)
    return price * EXPLICIT + EXPLICIT if overridden else price


def _loses_split(written: Layout, used: Layout) -> bool:
    """Whether a split that the plan wrote is undone or moved; splitting further is not that."""
    return any(written.split_dim(axis) != used.split_dim(axis) for axis in written.split_axes)

"""Refuse gathers that no statement of the plan asked for, unless they are small or allowed.

Requires: the movements of forward and backward. Ensures: those that remain were asked for, allowed
or small together.
"""

from __future__ import annotations

from collections.abc import Sequence

from meshwright.compiler.errors import LayoutError
from meshwright.compiler.graph.ir import Phase
from meshwright.compiler.graph.text import op_text
from meshwright.compiler.layout.factors import Factor, dim_axes, spelled_dim
from meshwright.compiler.layout.regroup import factors_for
from meshwright.compiler.placing.movement import Movement
from meshwright.compiler.placing.rules.lookup import has_rule
from meshwright.compiler.placing.rules.views import RESHAPES
from meshwright.dsl.statements import Allow
from meshwright.dsl.suggest import selectors_of
from meshwright.passes.statements.draft import Draft
from meshwright.passes.statements.pins import module_text
from meshwright.passes.statements.targets import modules_of

LIMIT = 64 << 10
"""Bytes per rank per step that implicit gathers may move together."""
_MOST_SELECTORS = 4


def check_replication(draft: Draft) -> Draft:
    """`draft`; raises `LayoutError` at the largest implicit gather where all move too much."""
    allowed = set(draft.plan.resolve(Allow, ["", *modules_of(draft)]))
    implicit = [
        movement
        for movement in draft.movements
        if movement.implicit
        and allowed.isdisjoint(path for path, _ in movement.node.origin.modules)
    ]
    total = sum(m.sent_bytes(draft.mesh) for m in implicit)
    if total <= LIMIT:
        return draft
    worst = max(implicit, key=lambda m: m.sent_bytes(draft.mesh))
    what = "gathering" if worst.collective.row.moves else "splitting"
    where = worst.node.origin
    raise LayoutError(
        f"`{op_text(worst.user)}` in {module_text(where.module)} {_why(worst)}: {what} "
        f"`{worst.value.name}` from `{worst.collective.source}` to `{worst.collective.target}` "
        "was not asked for",
        code="implicit-gather",
        culprit=f"{where.source}; {_many(len(implicit))} {total} bytes per step",
        help=_help(worst, implicit, draft),
    )


def _help(worst: Movement, implicit: Sequence[Movement], draft: Draft) -> str:
    allow = f"write `allow replicate {_targets(implicit)}`"
    dim = _composite(worst, draft)
    if dim is None:
        return f"{allow}, or lay the value out with `shard`"
    return f"lay out the dim as `{dim}` with `shard` or `columns ... as`, or {allow}"


def _composite(worst: Movement, draft: Draft) -> str | None:
    """The split dim as factors or segments that the operator can take apart, if there are any."""
    name, layout = worst.node.name, worst.collective.source
    dims = [dim for dim in layout.dims if dim_axes(dim)]
    users = [
        node
        for node in draft.graph.nodes
        if node.phase is Phase.FORWARD
        and node.op == worst.user
        and any(n.name == name for n in node.operands())
    ]
    if len(dims) != 1 or len(dims[0]) != 1 or len(dims[0][0]) != 1 or not users:
        return None
    types = users[0].type if isinstance(users[0].type, tuple) else (users[0].type,)
    shapes = [type.shape for type in types if type is not None]
    if worst.user in RESHAPES:
        return factors_for(layout, shapes[0], draft.mesh)
    axes, at = dim_axes(dims[0]), layout.dims.index(dims[0])
    sizes = [shape[at] for shape in shapes if len(shape) == len(layout.dims)]
    segments = len(sizes) > 1 and sum(sizes) == layout.shape[at]
    if not segments or any(size % draft.mesh.size(axes) for size in sizes):
        return None
    return spelled_dim(tuple((Factor(size, axes),) for size in sizes))


def _targets(movements: Sequence[Movement]) -> str:
    """Selectors for all modules that gather, so that one statement allows them."""
    modules = [movement.node.origin.module for movement in movements]
    found = selectors_of(modules)
    return "**" if "" in modules or len(found) > _MOST_SELECTORS else ", ".join(found)


def _many(count: int) -> str:
    return "it moves" if count == 1 else f"{count} such gathers move"


def _why(movement: Movement) -> str:
    """The reason why an operator asks for the movement."""
    if not has_rule(movement.user):
        return "has no rule and runs whole on every rank"
    if not movement.collective.row.moves:
        return "takes part of a whole value, whose gradient is then gathered"
    return "needs the whole of a split value"

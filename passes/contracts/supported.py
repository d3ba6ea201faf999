"""Refuse the statements whose passes this version does not have.

Requires: nothing. Ensures: a mesh, and a pass for every statement.
"""

from __future__ import annotations

from meshwright.dsl.plan import Plan
from meshwright.dsl.statements import (
    Accumulate,
    Allow,
    Axes,
    Checkpoint,
    Columns,
    Context,
    Data,
    Expect,
    Experts,
    Let,
    Memory,
    MeshStatement,
    Offload,
    Precision,
    Rows,
    Sequence,
    Shard,
    Share,
    Stages,
    Statement,
    Summa,
    Vocab,
    Zero,
)

CARRIED_OUT: tuple[type[Statement], ...] = (
    MeshStatement, Axes, Let, Precision, Accumulate, Data, Shard, Columns, Rows, Vocab, Summa,
    Sequence, Context, Experts, Memory, Zero, Stages, Checkpoint, Offload, Share, Expect, Allow,
)  # fmt: skip


def check_supported(plan: Plan) -> None:
    """Raises `PlanError` at the first statement that cannot be carried out, and without a mesh."""
    if not plan.mesh:
        raise plan.error(
            "P112", "the plan has no mesh", help="write `mesh dp=2, tp=2`, with the axes you want"
        )
    for statement in plan.statements:
        if missing := _missing(statement):
            what, place, help = missing
            raise plan.error(
                "P501",
                f"`{what}` is part of the language, but this version has no pass for it",
                statement.at(place),
                help=help,
            )


def _missing(statement: Statement) -> tuple[str, str, str] | None:
    """What of a statement cannot be carried out, its place, and what to do; None if all can."""
    if isinstance(statement, Precision) and statement.dropout == "native":
        help = "remove it: `hash` draws the same numbers under every plan"
        return "dropout=native", "dropout", help
    local = isinstance(statement, Allow) and statement.what == "local"
    if not local and isinstance(statement, CARRIED_OUT):
        return None
    verb = statement.verb
    if isinstance(statement, Allow):
        verb = f"{verb} {statement.what}"
    known = ", ".join(f"`{each.verb}`" for each in CARRIED_OUT)
    return verb, "", f"remove the statement; what can be compiled today is {known}"

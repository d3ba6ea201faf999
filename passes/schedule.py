"""Which rank of a pipeline runs which stage, and when: the table that a plan asks for."""

from __future__ import annotations

from meshwright.compiler.schedules.named import planned_table
from meshwright.compiler.schedules.tables import Size, Table
from meshwright.dsl.statements import Stages
from meshwright.passes.statements.accumulate import microbatches
from meshwright.passes.statements.draft import Draft


def pipeline_table(draft: Draft) -> Table | None:
    """The table of a program, in the mode in which it is compiled; None without a pipeline."""
    for statement in draft.plan.of(Stages):
        table = training_table(draft, statement)
        return table if draft.captured.mode == "train" else table.evaluation
    return None


def training_table(draft: Draft, statement: Stages) -> Table:
    """The table of a training step."""
    found = microbatches(draft.plan)
    size = Size(draft.mesh.size(statement.over), found[1] if found else 1, statement.virtual)
    return planned_table(statement, size)

"""Another schedule than a program's own, for what it would come to."""

from __future__ import annotations

from meshwright.compiler.schedules.actions import Link, actions_of
from meshwright.compiler.schedules.moves import completed
from meshwright.compiler.schedules.named import NAMED, planned_table
from meshwright.compiler.schedules.routes import LOOPED, chain
from meshwright.compiler.schedules.tables import B, F, Size, Table
from meshwright.dsl.plan import Plan
from meshwright.dsl.statements import SCHEDULES, Stages


def other_table(
    own: Table,
    statement: Stages | None,
    schedule: str | None,
    ranks: int | None,
    virtual: int | None,
    microbatches: int | None,
) -> tuple[Table, tuple[Link, ...]]:
    """The table of another schedule, and the links of stages that pass values to their neighbours
    alone; what is None is as in the program with the table `own`, whose plan has `statement`. A
    program without a backward runs one forward through all stages.

    Raises `PlanError` for a schedule that cannot be, as for one in a plan.
    """
    planned = statement or Stages()
    if virtual is None:
        virtual = planned.virtual if schedule is None else SCHEDULES.get(schedule, (1, None))[0]
    ranks = len(own.rows) if ranks is None else ranks
    microbatches = own.microbatches if microbatches is None else microbatches
    size = Size(ranks, microbatches, virtual)
    found = _statement(planned.schedule if schedule is None else str(schedule), size)
    table, num_stages = planned_table(found, size), size.coordinates * virtual
    phases, links = set(LOOPED), chain(num_stages)
    if not any(action.kind is B for row in own.rows for action in actions_of(row)):
        phases, links = {F}, tuple(link for link in links if link.source_phase is F)
        table = table.evaluation
    graphs = {(stage, phase) for stage in range(num_stages) for phase in phases}
    return completed(table, graphs, links), links


def _statement(schedule: str, size: Size) -> Stages:
    """A statement that asks for a schedule, read like one of a plan."""
    is_file = schedule not in NAMED and ("." in schedule or "/" in schedule)
    named = f'"{schedule.strip(chr(34))}"' if is_file else schedule
    text = (
        f"stages {size.coordinates * size.virtual} over pp schedule={named} "
        f"microbatches={size.microbatches} virtual={size.virtual}"
    )
    plan = Plan.parse(f"mesh pp={size.coordinates}\n{text}\n", "<what is asked for>")
    return plan.of(Stages)[0]

"""The schedules that a plan can name, and which numbers of microbatches and ranks each takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from meshwright.compiler.schedules import tables
from meshwright.compiler.schedules.files import loaded_table
from meshwright.compiler.schedules.tables import Size, Table
from meshwright.dsl.errors import PlanError, plural
from meshwright.dsl.statements import Stages

Misfit = tuple[str, str, str]
"""The part of the statement that does not fit, why, and what to write."""


@dataclass(frozen=True, slots=True)
class Named:
    """A schedule that a plan can name."""

    fill: Callable[[Size], Table]
    misfit: Callable[[Size], Misfit | None] = lambda size: None


def _uneven_rounds(size: Size) -> Misfit | None:
    """Multiple stages per coordinate take microbatches in rounds, all of the same number."""
    p, m = size.coordinates, size.microbatches
    if size.virtual == 1 or m % max(1, m // p) == 0:
        return None
    fit = [n for n in range(1, m + p + 1) if n % max(1, n // p) == 0]
    below, above = (max(n for n in fit if n < m), min(n for n in fit if n > m))
    why = f"over {p} ranks they come in {m // p} rounds, which must be of equal length"
    return "microbatches", why, f"write `microbatches={below}` or `microbatches={above}`"


def _few_or_odd(size: Size) -> Misfit | None:
    """DualPipe needs microbatches to fill both directions."""
    p, m = size.coordinates, size.microbatches
    if size.virtual == 1 and p % 2:
        help = "use `dualpipev`, with `virtual=2`"
        return "over", f"it needs an even number of ranks, not {p}", help
    if m >= 2 * p and (size.virtual == 2 or m % 2 == 0):
        return None
    even = ", an even number" if size.virtual == 1 else ""
    least = max(2 * p, m + m % 2 * (2 - size.virtual))
    why = f"over {p} ranks it needs at least {2 * p}{even}"
    return "microbatches", why, f"write `microbatches={least}`"


NAMED: Mapping[str, Named] = {
    "gpipe": Named(tables.gpipe),
    "1f1b": Named(tables.one_forward_one_backward),
    "interleaved": Named(tables.interleaved, _uneven_rounds),
    "zb": Named(tables.zero_bubble, _uneven_rounds),
    "zbh2": Named(tables.zero_bubble_ahead),
    "zbv": Named(tables.zero_bubble_v),
    "dualpipe": Named(tables.dualpipe, _few_or_odd),
    "dualpipev": Named(tables.dualpipe_v, _few_or_odd),
}


def planned_table(statement: Stages, size: Size) -> Table:
    """The table of the schedule, or in the file, that a statement names.

    Raises `PlanError`: P306 for a schedule that cannot be filled for so many ranks and
    microbatches, and P113 or P307 for a file.
    """
    schedule = NAMED.get(statement.schedule)
    if schedule is None:
        return loaded_table(statement, size)
    if misfit := schedule.misfit(size):
        part, why, help = misfit
        count = plural(size.microbatches, "microbatch")
        what = count if part == "microbatches" else "the mesh"
        raise PlanError(
            "P306",
            f"`{statement.schedule}` does not fit {what}: {why}",
            spans=[statement.at(part if part in statement.parts else "schedule")],
            help=help,
        )
    return schedule.fill(size)

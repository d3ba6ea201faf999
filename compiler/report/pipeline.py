"""A schedule as text: what each rank of the pipeline runs, and when it would.

rank 0  0F0 0F1 ······· 0I0 0W0 0I1 0W1
rank 1  ··· 1F0 1I0 1F1 1W0 1I1 1W1 ···
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rich.console import Console, Group, RenderableType
from rich.text import Text

from meshwright.compiler.report.show import WIDTH, plain, print_whole
from meshwright.compiler.schedules.actions import Link
from meshwright.compiler.schedules.files import cell, cells
from meshwright.compiler.schedules.routes import chain, routed
from meshwright.compiler.schedules.simulate import Costs, Ran, Simulation, Simulator, in_flight
from meshwright.compiler.schedules.tables import B, F, Table, W
from meshwright.dsl.errors import plural

_STYLES = {F: "blue", B: "green", W: "yellow"}
_LEGEND = "0F1: forward, stage 0, microbatch 1; I, W: backward for inputs, weights; B: both"
_MOST = 12
"""The most columns per action, on average; of uneven costs the short ones lose their names then."""


def print_schedule(
    table: Table,
    costs: Costs | None = None,
    links: Iterable[Link] | None = None,
    console: Console | None = None,
) -> None:
    """Print a schedule's table or, with costs, its timeline."""
    console = console or Console()
    print_whole(console, _parts(table, costs, links, console.width))


def schedule_text(
    table: Table,
    costs: Costs | None = None,
    links: Iterable[Link] | None = None,
    width: int = WIDTH,
) -> str:
    """What `print_schedule` prints, as plain text."""
    return plain(_parts(table, costs, links, width))


def _parts(
    table: Table, costs: Costs | None, links: Iterable[Link] | None, width: int
) -> RenderableType:
    links = chain(len(table.holders)) if links is None else tuple(links)
    p, m = len(table.rows), table.microbatches
    sizes = f"{plural(p, 'rank')}, {plural(len(table.holders), 'stage')}, microbatches: {m}"
    parts = [Text(sizes, "bold"), Text(_LEGEND, "dim")]
    if costs is None:
        parts += _wrapped(*_table_rows(table), width)
    else:
        simulation = Simulator(table, links).run(costs)
        parts += _wrapped(list(_timeline(simulation)), 1, width)
        parts.append(Text(_times(simulation)))
    counts = " ".join(str(in_flight(table, c)) for c in table.coordinates)
    parts.append(Text(f"most activations at once (one stage, one microbatch), by rank: {counts}"))
    num_messages = sum(not message.local for message in routed(table, links).messages)
    parts.append(Text(f"messages per step: {num_messages}"))
    return Group(*parts)


def _times(simulation: Simulation) -> str:
    idle = f"{100 * simulation.bubble_fraction:.1f}%"
    return (
        f"step: {simulation.makespan:g}; longest of a rank: {simulation.window:g}; bubble: {idle}"
    )


def _table_rows(table: Table) -> tuple[list[Text], int]:
    """The rows, and the columns of a cell: pairs that overlap are joined by `&`."""
    rows = [[_short(each) for each in cells(table, c)] for c in table.coordinates]
    widest = max((len(each) for row in rows for each in row), default=0) + 1
    return [Text("".join(each.ljust(widest) for each in row)) for row in rows], widest


def _short(cell: str) -> str:
    return cell.removesuffix("OVERLAP_F_B").strip("()").replace(";", "&")


def _timeline(simulation: Simulation) -> Iterator[Text]:
    """One row per rank, in which columns are time."""
    ran = [each for row in simulation.rows for each in row]
    begin = min(each.start for each in ran)
    shortest = min((each.end - each.start for each in ran if each.end > each.start), default=1)
    names = max(len(cell(each.action)) for each in ran)
    longest = max(len(row) for row in simulation.rows)
    scale = min((names + 1) / shortest, _MOST * longest / max(simulation.makespan, shortest))
    end = round(simulation.makespan * scale)
    for row in simulation.rows:
        text = Text()
        for each in row:
            _append(
                text, each, round((each.start - begin) * scale), round((each.end - begin) * scale)
            )
        text.append(_idle(text, end), "dim")
        yield text


def _append(text: Text, ran: Ran, start: int, end: int) -> None:
    """Add an action from one column to another; a blank ends it, if there is room for one."""
    text.append(_idle(text, start), "dim")
    name = cell(ran.action)
    block = name.ljust(end - start - 1, "─") + " "
    text.append(block[: end - start], _STYLES[ran.action.kind])


def _idle(text: Text, until: int) -> str:
    return ("·" * (until - len(text) - 1) + " ")[: max(0, until - len(text))]


def _wrapped(rows: list[Text], unit: int, width: int) -> Iterator[Text]:
    """The rows under each other, in panels that fit `width`, cut at multiples of `unit` columns."""
    heads = [f"rank {i}".ljust(len(f"rank {len(rows) - 1}")) + "  " for i in range(len(rows))]
    room = max(1, max(20, width - len(heads[0])) // unit) * unit
    for start in range(0, max(len(row) for row in rows), room):
        yield Text()
        for head, row in zip(heads, rows, strict=True):
            yield Text.assemble((head, "dim"), row[start : start + room])

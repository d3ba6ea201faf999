"""Tables in which something is wrong are refused, and no others."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import pytest

from meshwright.compiler.graph.ir import Phase
from meshwright.compiler.schedules.actions import Action, Entry, Link
from meshwright.compiler.schedules.faults import find_fault
from meshwright.compiler.schedules.moves import completed
from meshwright.compiler.schedules.named import NAMED
from meshwright.compiler.schedules.routes import chain
from meshwright.compiler.schedules.tables import Size, Table
from tests.compiler.schedules.paper import Paper, Wrong

SIZES = {"interleaved": 2, "zbv": 2, "dualpipev": 2}


def links_of(last: int) -> tuple[Link, ...]:
    """Those of a chain, of a weight that stage 0 owns and the last stage uses too, and of the loss,
    which every stage returns."""
    tied = (Link(0, Phase.BEFORE, last, Phase.BEFORE), Link(last, Phase.AFTER, 0, Phase.AFTER))
    loss = (Link(last, Phase.AFTER, stage, Phase.RESULTS) for stage in range(last))
    return (*chain(last + 1), *tied, *loss)


def graphs_of(last: int) -> frozenset[tuple[int, Phase]]:
    """Every stage has all but copies to sum up; the last alone counts, and has its own results."""
    every = {(stage, phase) for stage in range(last + 1) for phase in Phase}
    others = {(stage, Phase.COUNT) for stage in range(last)} | {(last, Phase.RESULTS)}
    return frozenset(every - others - {(stage, Phase.SUM) for stage in range(last + 1)})


def complete(name: str, p: int, m: int) -> Table:
    table = NAMED[name].fill(Size(p, m, SIZES.get(name, 1)))
    last = len(table.holders) - 1
    return completed(table, graphs_of(last), links_of(last))


def refused(table: Table) -> str:
    last = len(table.holders) - 1
    return str(find_fault(table, graphs_of(last), links_of(last), sends=True) or "")


def outcome(table: Table) -> object:
    """What ranks compute, or why they do not."""
    last = len(table.holders) - 1
    try:
        return Paper(table.rows, links_of(last), graphs_of(last), table.microbatches).run()
    except Wrong as error:
        return str(error)


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize(("p", "m"), [(2, 4), (4, 8), (6, 12)])
def test_every_schedule_runs_on_paper_and_is_accepted(name: str, p: int, m: int) -> None:
    table = complete(name, p, m)
    assert refused(table) == ""
    assert not isinstance(outcome(table), str)


def mutated(table: Table, rng: random.Random) -> tuple[str, Table]:
    """A table with one entry dropped, swapped, repeated, elsewhere, changed, or like another."""
    rows = [list(row) for row in table.rows]
    c, d = rng.randrange(len(rows)), rng.randrange(len(rows))
    i, j = rng.randrange(len(rows[c])), rng.randrange(len(rows[c]))
    entry: Entry = rows[c][i]
    kind = rng.choice(["drop", "swap", "next", "repeat", "away", "peer", "microbatch", "like"])
    match kind:
        case "drop":
            del rows[c][i]
        case "swap":
            rows[c][i], rows[c][j] = rows[c][j], rows[c][i]
        case "next":
            i = min(i, len(rows[c]) - 2)
            rows[c][i : i + 2] = rows[c][i + 1], rows[c][i]
        case "repeat":
            rows[d].insert(rng.randrange(len(rows[d]) + 1), entry)
        case "away":
            rows[c].pop(i)
            rows[d].insert(rng.randrange(len(rows[d]) + 1), entry)
        case "peer" if not isinstance(entry, Action):
            rows[c][i] = replace(entry, peer=rng.randrange(len(rows)))
        case "like":
            rows[c].insert(j, replace(entry, microbatch=rng.randrange(table.microbatches + 1)))
        case _:
            rows[c][i] = replace(entry, microbatch=rng.randrange(table.microbatches + 1))
    return kind, replace(table, rows=tuple(map(tuple, rows)))


def mutations(count: int) -> Iterator[tuple[str, Table, object]]:
    rng = random.Random(0)
    sizes = [(name, p, m) for name in NAMED for p, m in ((2, 4), (4, 8))]
    tables = {size: complete(*size) for size in sizes}
    expected = {size: outcome(table) for size, table in tables.items()}
    for _ in range(count):
        size = rng.choice(sizes)
        kind, table = mutated(tables[size], rng)
        yield f"{kind} in {size}", table, expected[size]


def test_of_a_thousand_mutations_those_that_hang_or_compute_something_else_are_refused() -> None:
    harmless = 0
    for what, table, expected in mutations(1000):
        found = outcome(table)
        fault = refused(table)
        assert (fault == "") == (found == expected), (
            what,
            fault,
            found if isinstance(found, str) else "computes something else",
        )
        harmless += not fault
    assert 50 < harmless < 500

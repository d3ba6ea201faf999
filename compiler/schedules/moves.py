"""The sends and receives of a schedule, in an order in which no rank waits for ever.

All ranks are walked at once. When one of them runs an action, what others need of it is sent at
once, and those begin to receive it at that moment. So all sends and receives are in one global
order, which no two ranks contradict.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace

from meshwright.compiler.graph.ir import Phase
from meshwright.compiler.schedules.actions import Action, Entry, Link, Send, actions_of
from meshwright.compiler.schedules.routes import Message, Routes, routed
from meshwright.compiler.schedules.tables import Table

Graphs = Collection[tuple[int, Phase]]
"""The stages and phases of which there is a graph."""


def whole(table: Table, graphs: Graphs, links: Iterable[Link]) -> Table:
    """A table with what runs before and after the loop, without actions that have no graph, and
    with the moves for the values of `links`."""
    framed = replace(table, rows=tuple(_framed(table, c, graphs) for c in table.coordinates))
    routes = routed(framed, links)
    rows: list[list[Entry]] = [[] for _ in table.rows]
    for c, action in walked(framed, routes, sends=False):
        rows[c].append(action)
        for message in routes.made_by(c, action):
            if not message.local:
                rows[c].append(message.send)
                rows[message.target].append(message.receive)
    return replace(table, rows=tuple(map(tuple, rows)))


def _framed(table: Table, coordinate: int, graphs: Graphs) -> tuple[Action, ...]:
    """Counts of all microbatches, what runs once before, the loop, and what runs once after it."""
    own = [stage for stage, held in enumerate(table.holders) if coordinate in held]
    turns = range(table.microbatches)
    actions = [Action(Phase.COUNT, stage, i) for stage in own for i in turns]
    actions += [Action(Phase.BEFORE, stage) for stage in own]
    actions += actions_of(table.rows[coordinate])
    actions += [Action(Phase.SUM, stage) for stage in reversed(own)]
    actions += [Action(Phase.AFTER, stage) for stage in reversed(own)]
    return tuple(action for action in actions if (action.stage, action.kind) in graphs)


def walked(table: Table, routes: Routes, *, sends: bool) -> Iterator[tuple[int, Entry]]:
    """The coordinates and their entries in an order in which they can run, in rounds of one each.

    It ends where all that are not done wait. With `sends`, a value for another coordinate is there
    once its send has run, and otherwise as soon as it is made.
    """
    there: set[Message] = set()
    places = [0] * len(table.rows)
    while True:
        ready = [
            (c, row[place])
            for c, (row, place) in enumerate(zip(table.rows, places, strict=True))
            if place < len(row) and not missing(routes, c, row[place], there)
        ]
        if not ready:
            return
        for c, entry in ready:
            places[c] += 1
            there |= _given(routes, c, entry, sends)
        yield from ready


def missing(
    routes: Routes, coordinate: int, entry: Entry, there: Collection[Message]
) -> list[Message]:
    """What an entry waits for."""
    return [each for each in routes.taken_by(coordinate, entry) if each not in there]


def _given(routes: Routes, coordinate: int, entry: Entry, sends: bool) -> set[Message]:
    """What is there once an entry has run."""
    match entry:
        case Action():
            made = routes.made_by(coordinate, entry)
            return {message for message in made if message.local or not sends}
        case Send(link, microbatch, peer):
            return {Message(link, microbatch, coordinate, peer)}
        case _:
            return set()

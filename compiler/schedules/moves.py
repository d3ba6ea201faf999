"""What surrounds the loop of a schedule, and its sends and receives, in an order in which no rank
waits for ever.

What a stage runs once before the loop stands one action before the first of its own, so that its
weights are gathered meanwhile. What it runs once after the loop stands right behind its last
action, so that its gradients are reduced while the rank runs other stages. Where one of these would
wait for another rank, the loop goes on with other stages. Counts come first, while most ranks have
nothing else to do, and what a step returns comes last.

All ranks are walked at once. When one of them runs an action, what others need of it is sent at
once, and those begin to receive it at that moment. So all sends and receives are in one global
order, which no two ranks contradict. What is made after the loop is sent when a rank's loop is
over, so that no rank waits for its own reductions in between.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace

from meshwright.compiler.graph.ir import Phase
from meshwright.compiler.schedules.actions import Action, Entry, Link, Send, actions_of
from meshwright.compiler.schedules.routes import LOOPED, Message, Routes, routed
from meshwright.compiler.schedules.tables import Table

Graphs = Collection[tuple[int, Phase]]
"""The stages and phases of which there is a graph."""


def completed(table: Table, graphs: Graphs, links: Iterable[Link]) -> Table:
    """A table with what runs before and after the loop, without actions that have no graph, and
    with the moves for the values of `links`."""
    rows = [list(_framed(table, c, graphs)) for c in table.coordinates]
    framed = replace(table, rows=tuple(map(tuple, rows)))
    return replace(table, rows=_Layout(rows, routed(framed, links)).run())


def _framed(table: Table, coordinate: int, graphs: Graphs) -> Iterator[Action]:
    """A row of the loop, with counts of all microbatches and what each of its stages runs once."""
    loop = actions_of(table.rows[coordinate])
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for place, action in enumerate(loop):
        last[action.stage] = place
        first.setdefault(action.stage, max(place - 1, 0))
    own = [stage for stage, held in enumerate(table.holders) if coordinate in held]
    before: list[list[Action]] = [[] for _ in (*loop, ...)]
    after: list[list[Action]] = [[] for _ in (*loop, ...)]
    before[0] += [Action(Phase.COUNT, s, i) for s in own for i in range(table.microbatches)]
    for stage in own:
        before[first.get(stage, 0)].append(Action(Phase.BEFORE, stage))
    for stage in reversed(own):
        after[last.get(stage, -1)] += [Action(Phase.SUM, stage), Action(Phase.AFTER, stage)]
    after[-1] += [Action(Phase.RESULTS, stage) for stage in reversed(own)]
    for place in range(len(loop) + 1):
        found = (*before[place], *loop[place : place + 1], *after[place])
        yield from (each for each in found if (each.stage, each.kind) in graphs)


class _Layout:
    """Lays out the actions of all coordinates with their moves: each row is left in its order, but
    that what runs once lets other stages pass while it waits."""

    def __init__(self, left: list[list[Action]], routes: Routes) -> None:
        self.left, self.routes = left, routes
        self.rows: list[list[Entry]] = [[] for _ in left]
        self.there: set[Message] = set()
        self.held_back: list[list[Message]] = [[] for _ in left]
        """By coordinate: what is sent once its loop is over."""

    def run(self) -> tuple[tuple[Entry, ...], ...]:
        """The rows; where all that are left wait for one another they are not whole."""
        while ready := [(c, place) for c in range(len(self.rows)) for place in self._next(c)]:
            for c, action in [(c, self.left[c].pop(place)) for c, place in ready]:
                self._put(c, action)
        return tuple(map(tuple, self.rows))

    def _next(self, coordinate: int) -> Iterator[int]:
        """The place of the action that a coordinate runs next of those left, unless it waits."""
        waiting: set[int] = set()
        for place, action in enumerate(self.left[coordinate]):
            if action.stage in waiting:
                continue
            if not missing(self.routes, coordinate, action, self.there):
                yield place
                return
            if action.kind in LOOPED:
                return
            waiting.add(action.stage)

    def _put(self, coordinate: int, action: Action) -> None:
        self.rows[coordinate].append(action)
        looped = any(each.kind in LOOPED for each in self.left[coordinate])
        messages = list(self.routes.made_by(coordinate, action))
        if action.kind is Phase.AFTER and looped:
            kept = [message for message in messages if not message.local]
            self.held_back[coordinate] += kept
            messages = [message for message in messages if message.local]
        elif not looped:
            messages = [*self.held_back[coordinate], *messages]
            self.held_back[coordinate] = []
        for message in messages:
            self.there.add(message)
            if not message.local:
                self.rows[coordinate].append(message.send)
                self.rows[message.target].append(message.receive)


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

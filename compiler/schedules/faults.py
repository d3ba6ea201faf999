"""What is wrong with a table: looked for before anything runs.

Everything runs exactly once, where its stage is, and after what it needs on the same rank; each
send has its receive, in the same order between the same two ranks; and no rank waits for ever.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain

from meshwright.compiler.graph.ir import Phase
from meshwright.compiler.schedules.actions import Action, Entry, Link, Receive, Send, actions_of
from meshwright.compiler.schedules.moves import Graphs, missing, walked
from meshwright.compiler.schedules.routes import LOOPED, Message, Routes, routed
from meshwright.compiler.schedules.tables import Table

_ORDER = {phase: i for i, phase in enumerate(Phase)}


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong at a coordinate of a table, and with which entry."""

    coordinate: int
    entry: Entry
    problem: str
    place: int | None = None
    """The position of the entry in its row, if it is in it."""

    def __str__(self) -> str:
        return f"`{self.entry}` on rank {self.coordinate} of the pipeline {self.problem}"


def find_fault(table: Table, graphs: Graphs, links: Iterable[Link], *, sends: bool) -> Fault | None:
    """The first thing wrong with a table of a program with these graphs and links.

    Without `sends` the table has no moves yet, and is what it would be with those that it needs.
    """
    return next(chain(_of_actions(table, graphs), _of_moves(table, links, sends)), None)


def _of_actions(table: Table, graphs: Graphs) -> Iterator[Fault]:
    for c, row in enumerate(table.rows):
        yield from _of_row(table, c, row, graphs)
    yield from _apart(table)
    yield from _left_out(table, graphs)


def _of_moves(table: Table, links: Iterable[Link], sends: bool) -> Iterator[Fault]:
    routes = routed(table, links)
    if sends:
        for c, row in enumerate(table.rows):
            yield from _unmatched(routes, c, row)
        yield from _crossed(table)
    yield from _waiting(table, routes, sends)


def _of_row(table: Table, coordinate: int, row: Sequence[Entry], graphs: Graphs) -> Iterator[Fault]:
    """Actions that cannot run here, run again, or run before what they need."""
    seen: set[Action] = set()
    latest = _Latest()
    for place, action in enumerate(row):
        if not isinstance(action, Action):
            continue
        if problem := _unknown(table, coordinate, action, graphs):
            yield Fault(coordinate, action, problem, place)
        elif action in seen:
            yield Fault(coordinate, action, "runs twice", place)
        elif after := latest.before(action):
            yield Fault(coordinate, action, f"comes after `{after}`, which needs it", place)
        seen.add(action)


def _unknown(table: Table, coordinate: int, action: Action, graphs: Graphs) -> str:
    """Why an action cannot run here, if it cannot."""
    if action.stage not in range(len(table.holders)):
        return f"is of none of the {len(table.holders)} stages"
    if (action.stage, action.kind) not in graphs:
        return "has no graph"
    if coordinate not in table.holders[action.stage]:
        where = " and ".join(map(str, table.holders[action.stage]))
        return f"is of a stage that is on {where}"
    count = 1 if action.kind.once else table.microbatches
    if action.microbatch not in range(count):
        return f"is of none of the microbatches, 0 to {count - 1}"
    return ""


class _Latest:
    """The action of the latest phase so far: of each microbatch of a stage, of what is of no
    microbatch, and of all."""

    def __init__(self) -> None:
        self.actions: dict[tuple[int, int | str], Action] = {}

    def before(self, action: Action) -> Action | None:
        """An action so far that needs what this one makes; this one is of those so far then."""
        own: int | str = action.microbatch if action.kind in LOOPED else "once"
        seen = (own, "once") if action.kind in LOOPED else ("all",)
        found = [each for key in seen if (each := self.actions.get((action.stage, key)))]
        for key in (own, "all"):
            other = self.actions.setdefault((action.stage, key), action)
            if _ORDER[other.kind] < _ORDER[action.kind]:
                self.actions[action.stage, key] = action
        return next((each for each in found if _ORDER[each.kind] > _ORDER[action.kind]), None)


def _apart(table: Table) -> Iterator[Fault]:
    """Actions of one microbatch of a stage that are on two ranks."""
    homes: dict[tuple[int, int], tuple[int, Action]] = {}
    for kind in LOOPED:
        for c, row in enumerate(table.rows):
            for action in (each for each in actions_of(row) if each.kind is kind):
                home, first = homes.setdefault((action.stage, action.microbatch), (c, action))
                if home != c:
                    yield Fault(
                        c, action, f"needs to be on rank {home}, as `{first}`", row.index(action)
                    )


def _left_out(table: Table, graphs: Graphs) -> Iterator[Fault]:
    """Actions that no rank runs, or, of those that run on all that have a stage, not every one."""
    rows = [set(actions_of(row)) for row in table.rows]
    homes = {
        (a.stage, a.microbatch): c for c, row in enumerate(rows) for a in row if a.kind in LOOPED
    }
    for stage, kind in sorted(graphs, key=lambda graph: (graph[0], _ORDER[graph[1]])):
        for i in range(1 if kind.once else table.microbatches):
            action, held = Action(kind, stage, i), table.holders[stage]
            where = (homes.get((stage, i), held[0]),) if kind in LOOPED else held
            for c in where:
                if action not in rows[c]:
                    yield Fault(c, action, "is missing")


def _unmatched(routes: Routes, coordinate: int, row: Sequence[Entry]) -> Iterator[Fault]:
    """Sends before their values are made, receives after they are taken, those that are missing,
    come twice, or are for nothing."""
    places = {action: place for place, action in enumerate(row) if isinstance(action, Action)}
    made: dict[Entry, int] = {}
    taken: dict[Entry, int] = {}
    for message in routes.messages:
        if not message.local and coordinate == message.source:
            made[message.send] = places[message.made_by]
        elif not message.local and coordinate == message.target:
            taken[message.receive] = places[message.taken_by]
    seen: set[Entry] = set()
    for place, entry in enumerate(row):
        if isinstance(entry, Action):
            continue
        if entry in seen:
            yield Fault(coordinate, entry, "runs twice", place)
        elif entry not in made.keys() | taken.keys():
            yield Fault(coordinate, entry, "is of nothing that goes there", place)
        elif made.get(entry, place) > place:
            yield Fault(coordinate, entry, f"comes before `{row[made[entry]]}`", place)
        elif taken.get(entry, place) < place:
            yield Fault(coordinate, entry, f"comes after `{row[taken[entry]]}`", place)
        seen.add(entry)
    yield from (Fault(coordinate, e, "is missing") for e in (*made, *taken) if e not in seen)


def _crossed(table: Table) -> Iterator[Fault]:
    """Sends and receives that are not in the same order between two ranks."""
    Channel = tuple[int, int, bool]
    sent: dict[Channel, list[Message]] = {}
    received: dict[Channel, list[tuple[Message, Fault]]] = {}
    for c, row in enumerate(table.rows):
        for place, entry in enumerate(row):
            match entry:
                case Send(link, microbatch, peer):
                    message = Message(link, microbatch, c, peer)
                    sent.setdefault((c, peer, link.backward), []).append(message)
                case Receive(link, microbatch, peer):
                    message, fault = Message(link, microbatch, peer, c), Fault(c, entry, "", place)
                    received.setdefault((peer, c, link.backward), []).append((message, fault))
    for channel, messages in received.items():
        for first, (second, fault) in zip(sent[channel], messages, strict=True):
            if first != second:
                yield replace(fault, problem=f"meets `{first.send}` of rank {channel[0]}")


def _waiting(table: Table, routes: Routes, sends: bool) -> Iterator[Fault]:
    """Actions that wait for one another."""
    places = Counter(c for c, _ in walked(table, routes, sends=sends))
    left = {c: row[places[c] :] for c, row in enumerate(table.rows) if row[places[c] :]}
    for c, (entry, *_) in left.items():
        for message in missing(routes, c, entry, ()):
            others = left.get(message.source, ())
            if message.made_by in others or message.send in others:
                what = f"`{message.made_by}` of rank {message.source}"
                where = "" if others[0] == message.made_by else f" at `{others[0]}`"
                problem = f"waits for ever for {what}, which waits too{where}"
                if message.source == c:
                    problem = f"comes before `{message.made_by}`, which it needs"
                yield Fault(c, entry, problem, places[c])

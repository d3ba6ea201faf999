"""Until when what runs once goes on beside other actions: its collectives are under way meanwhile.

What a stage runs once before or after its loop begins where the schedule has it, up to where it
would wait for a collective. The rest runs before the first entry that needs it, which may be many
actions later: the next action of the stage, or what sends or takes what it makes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from meshwright.compiler.graph.ir import Phase
from meshwright.compiler.schedules.actions import Action, Entry, Link, Receive, Send

_Graph = tuple[int, Phase]
Ends = Mapping[int, tuple[int, ...]]
"""By place of an entry, or the number of entries for the end of a row: the places of the actions
that run to their ends before it."""


def ends(row: Sequence[Entry], links: Collection[Link]) -> Ends:
    """When the actions of a row that run once end."""
    received = {each.link for each in row if isinstance(each, Receive)}
    handed_over = {
        ((each.source, each.source_phase), (each.target, each.target_phase))
        for each in links
        if each not in received
    }
    begun: dict[_Graph, int] = {}
    found: dict[int, tuple[int, ...]] = {}
    for place, entry in enumerate(row):
        needed = [key for key in begun if _needs(entry, key, handed_over)]
        if needed:
            found[place] = tuple(begun.pop(key) for key in needed)
        if isinstance(entry, Action) and entry.kind.once:
            begun[entry.stage, entry.kind] = place
    if begun:
        found[len(row)] = tuple(begun.values())
    return found


def _needs(entry: Entry, made: _Graph, handed_over: Collection[tuple[_Graph, _Graph]]) -> bool:
    """Whether an entry needs what a graph makes."""
    match entry:
        case Action(kind, stage):
            return stage == made[0] or (made, (stage, kind)) in handed_over
        case Send(link):
            return (link.source, link.source_phase) == made
        case _:
            return False


def beside(rows: Iterable[Sequence[Entry]], links: Collection[Link]) -> set[_Graph]:
    """The stages and phases whose graph goes on while a rank runs other actions."""
    found: set[_Graph] = set()
    for row in rows:
        for end, begun in ends(row, links).items():
            for place in begun:
                action = row[place]
                assert isinstance(action, Action)
                between = row[place + 1 : end]
                if any(isinstance(e, Action) and not e.kind.once for e in between):
                    found.add((action.stage, action.kind))
    return found

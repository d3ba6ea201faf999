"""When a rank knows that what it has sent has arrived, so that it need not keep it any longer.

It knows once it has taken a value that another rank sent after it had taken this one, directly or
through others: then nothing is left to wait for. In 1F1B that is the gradient of what was sent.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from meshwright.compiler.schedules.actions import Action, Entry, Receive, Send

Rows = Sequence[Sequence[Entry]]
"""The entries of each coordinate along a pipeline."""
_Channel = tuple[int, int, bool]
"""Source, target, and whether values of the backward move there."""


def settled(rows: Rows) -> tuple[Mapping[int, tuple[int, ...]], ...]:
    """By coordinate, and by the place of an action in its row: the places of the sends of which it
    knows, once the action has what it takes, that they have arrived."""
    walk = _Walk(rows)
    walk.run()
    found: tuple[dict[int, tuple[int, ...]], ...] = tuple({} for _ in rows)
    for (source, place), (target, taken) in walk.taken.items():
        known = [clock[target] for clock in walk.clocks[source]]
        after = bisect_right(known, taken)
        if after < len(known):
            found[source][after] = (*found[source].get(after, ()), place)
    return found


@dataclass
class _Walk:
    """A walk along all rows: how far each coordinate knows the others to be, at each entry."""

    rows: Rows
    clocks: list[list[list[int]]] = field(init=False)
    """By coordinate and entry: the number of entries that each coordinate is known to have done."""
    taken: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict)
    """By coordinate and place of a send: where the value is taken."""

    def __post_init__(self) -> None:
        self.clocks = [[] for _ in self.rows]
        self._sent: dict[_Channel, list[int]] = {}
        self._posted: dict[tuple[int, Action], list[tuple[_Channel, int]]] = {}
        self._counts: dict[_Channel, int] = {}

    def run(self) -> None:
        """Until no coordinate can go on."""
        moved = True
        while moved:
            moved = False
            for coordinate, row in enumerate(self.rows):
                while len(self.clocks[coordinate]) < len(row) and self._goes(coordinate):
                    moved = True

    def _goes(self, coordinate: int) -> bool:
        clocks = self.clocks[coordinate]
        place = len(clocks)
        clock = list(clocks[-1]) if clocks else [0] * len(self.rows)
        match self.rows[coordinate][place]:
            case Send(link, _, peer):
                self._sent.setdefault((coordinate, peer, link.backward), []).append(place)
            case Receive(link, microbatch, peer):
                channel = (peer, coordinate, link.backward)
                order = self._counts[channel] = self._counts.get(channel, -1) + 1
                taker = Action(link.target_phase, link.target, microbatch)
                self._posted.setdefault((coordinate, taker), []).append((channel, order))
            case action:
                taken = self._posted.get((coordinate, action), ())
                if any(order >= len(self._sent.get(channel, ())) for channel, order in taken):
                    return False
                for channel, order in taken:
                    source, sent = channel[0], self._sent[channel][order]
                    self.taken[source, sent] = (coordinate, place)
                    clock = list(map(max, clock, self.clocks[source][sent]))
        clock[coordinate] = place + 1
        clocks.append(clock)
        return True

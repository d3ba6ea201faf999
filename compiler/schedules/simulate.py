"""When each action of a table runs, given what graphs and hops cost."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from meshwright.compiler.graph.ir import Phase
from meshwright.compiler.schedules.actions import Action, Link, actions_of
from meshwright.compiler.schedules.routes import LOOPED, chain, routed
from meshwright.compiler.schedules.tables import B, F, Table, W


@dataclass(frozen=True, slots=True)
class Costs:
    """What the graphs of each stage cost, and the time between a send and its arrival, all in one
    unit of time."""

    forward: Sequence[float]
    backward: Sequence[float]
    """Of gradients for inputs, and for weights too where one graph computes both."""
    weight: Sequence[float]
    hop: float = 0
    around: Mapping[Phase, Sequence[float]] = field(default_factory=dict)
    """Of what runs before and after the loop over microbatches, by phase; others cost nothing."""

    def of(self, action: Action) -> float:
        """What an action costs."""
        if action.kind not in LOOPED:
            costs = self.around.get(action.kind)
            return costs[action.stage] if costs else 0
        kind = self.forward if action.kind is F else self.backward
        return (self.weight if action.kind is W else kind)[action.stage]

    @classmethod
    def of_phases(cls, costs: Mapping[Phase, Sequence[float]]) -> Costs:
        """Those of all phases, of which some may have none."""
        forward, backward, weight = (costs[phase] for phase in LOOPED)
        around = {p: each for p, each in costs.items() if p not in LOOPED and any(each)}
        return cls(forward, backward, weight, around=around)

    @classmethod
    def equal(cls, num_stages: int) -> Costs:
        """Those of stages in which each kind of action takes one unit of time."""
        ones = (1,) * num_stages
        return cls(ones, ones, ones)


@dataclass(frozen=True, slots=True)
class Ran:
    """An action and when it ran."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True, slots=True, repr=False)
class Simulation:
    """When each coordinate ran what."""

    rows: tuple[tuple[Ran, ...], ...]
    num_messages: int
    """How many times values went from one coordinate to another."""

    def __repr__(self) -> str:
        return f"<Simulation of {sum(map(len, self.rows))} actions, in {self.makespan:g}>"

    @property
    def makespan(self) -> float:
        """From the first start to the last end over all coordinates: the time of a step."""
        ran = [each for row in self.rows for each in row]
        return max(each.end for each in ran) - min(each.start for each in ran)

    @property
    def window(self) -> float:
        """The longest time from the first start to the last end of one coordinate; what costs
        nothing neither starts nor ends it."""
        rows = [[each for each in row if each.end > each.start] for row in self.rows]
        return max((row[-1].end - row[0].start for row in rows if row), default=0)

    @property
    def busy(self) -> tuple[float, ...]:
        """By coordinate: how long it computes."""
        return tuple(sum(each.end - each.start for each in row) for row in self.rows)

    @property
    def bubble_fraction(self) -> float:
        """The share of the step in which a coordinate computes nothing, on average."""
        whole = len(self.rows) * self.makespan
        return 1 - sum(self.busy) / whole if whole else 0.0


class Simulator:
    """A table that is run on paper, for any costs.

    `links` are those of the stages, by default between neighbours. With `late`, a whole backward
    sends its gradient only after the weight gradients, as autograd does. With `fused`, a forward
    and the backward that it overlaps begin when both can, and send when both are done.
    """

    def __init__(
        self,
        table: Table,
        links: Iterable[Link] | None = None,
        *,
        late: bool = False,
        fused: bool = False,
    ) -> None:
        routes = routed(table, chain(len(table.holders)) if links is None else links)
        numbers = {message: i for i, message in enumerate(routes.messages)}
        self.local = [message.local for message in numbers]
        self.blocks = [
            [
                _Block(
                    tuple(actions),
                    tuple(numbers[m] for a in actions for m in routes.taken_by(c, a)),
                    tuple(numbers[m] for a in actions for m in routes.made_by(c, a)),
                )
                for actions in _blocks(table, c, late, fused)
            ]
            for c in table.coordinates
        ]

    def run(self, costs: Costs) -> Simulation:
        """When each action runs."""
        rows: list[list[Ran]] = [[] for _ in self.blocks]
        places = [0] * len(rows)
        arrivals: list[float | None] = [None] * len(self.local)
        progress = True
        while progress:
            progress = False
            for c, blocks in enumerate(self.blocks):
                row = rows[c]
                for block in blocks[places[c] :]:
                    times = [arrivals[i] for i in block.taken]
                    known = [time for time in times if time is not None]
                    if len(known) < len(times):
                        break
                    row += block.run(max([row[-1].end if row else 0, *known]), costs)
                    for i in block.made:
                        arrivals[i] = row[-1].end + (0 if self.local[i] else costs.hop)
                    places[c] += 1
                    progress = True
        return Simulation(tuple(map(tuple, rows)), self.local.count(False))


@dataclass(frozen=True, slots=True)
class _Block:
    """Actions that wait together and send together, with the numbers of their messages."""

    actions: tuple[Action, ...]
    taken: tuple[int, ...]
    made: tuple[int, ...]

    def run(self, start: float, costs: Costs) -> Iterator[Ran]:
        for action in self.actions:
            yield Ran(action, start, start := start + costs.of(action))


def _blocks(table: Table, coordinate: int, late: bool, fused: bool) -> Iterator[list[Action]]:
    """The actions that wait together and send together."""
    left = list(actions_of(table.rows[coordinate]))
    while left:
        size = 3 if fused and left[0] in table.overlapped else 1
        if late and size == 1 and is_whole(left[:2]):
            size = 2
        yield left[:size]
        del left[:size]


def is_whole(actions: Sequence[Action]) -> bool:
    """Whether two actions are a backward for inputs and its own weight gradients."""
    return any(
        (first.kind, second.kind) == (B, W)
        and (first.stage, first.microbatch) == (second.stage, second.microbatch)
        for first, second in pairwise(actions)
    )


def in_flight(table: Table, coordinate: int, until: Sequence[Phase] = LOOPED) -> int:
    """The most activations that a coordinate holds at once: of stages, each for one microbatch,
    from the forward to the last of the actions `until`."""
    actions = [each for each in actions_of(table.rows[coordinate]) if each.kind in until]
    last = {(each.stage, each.microbatch): i for i, each in enumerate(actions)}
    most, held = 0, set[tuple[int, int]]()
    for i, each in enumerate(actions):
        key = each.stage, each.microbatch
        held.add(key)
        most = max(most, len(held))
        if last[key] == i:
            held.discard(key)
    return most

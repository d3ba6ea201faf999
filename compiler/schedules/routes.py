"""Who sends which values to whom: from the links between graphs, and where each graph runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from meshwright.compiler.errors import PassError
from meshwright.compiler.graph.ir import Phase
from meshwright.compiler.schedules.actions import (
    Action,
    Entry,
    Link,
    Receive,
    Send,
    actions_of,
)
from meshwright.compiler.schedules.tables import B, F, Table

LOOPED = (Phase.FORWARD, Phase.BACKWARD, Phase.WEIGHT)
"""The phases that run once for each microbatch, on one of the coordinates that have the stage; the
others run on all of them."""


@dataclass(frozen=True, slots=True)
class Message:
    """The values of a link, of one microbatch, on their way between two coordinates, or to another
    stage of the same one."""

    link: Link
    microbatch: int
    source: int
    target: int

    @property
    def local(self) -> bool:
        """Whether it stays where it is."""
        return self.source == self.target

    @property
    def made_by(self) -> Action:
        """What the source runs before it is sent."""
        return Action(self.link.source_phase, self.link.source, self.microbatch)

    @property
    def taken_by(self) -> Action:
        """What the target runs with it."""
        return Action(self.link.target_phase, self.link.target, self.microbatch)

    @property
    def send(self) -> Send:
        """The entry of the source."""
        return Send(self.link, self.microbatch, self.target)

    @property
    def receive(self) -> Receive:
        """The entry of the target."""
        return Receive(self.link, self.microbatch, self.source)


@dataclass(frozen=True, slots=True)
class Routes:
    """The messages of a step, by coordinate and the action that makes or takes them."""

    made: Mapping[tuple[int, Entry], tuple[Message, ...]]
    taken: Mapping[tuple[int, Entry], tuple[Message, ...]]

    def made_by(self, coordinate: int, entry: Entry) -> tuple[Message, ...]:
        """What is sent, or handed over, once an entry has run; nothing if it is a move."""
        return self.made.get((coordinate, entry), ())

    def taken_by(self, coordinate: int, entry: Entry) -> tuple[Message, ...]:
        """What an entry waits for; nothing if it is a move."""
        return self.taken.get((coordinate, entry), ())

    @property
    def messages(self) -> Iterator[Message]:
        """All of them."""
        return (message for each in self.made.values() for message in each)


def chain(num_stages: int) -> tuple[Link, ...]:
    """The links of a pipeline in which each stage needs only what its neighbours make."""
    cuts = [(stage, stage + 1) for stage in range(num_stages - 1)]
    forward = [Link(first, F, second, F) for first, second in cuts]
    return (*forward, *(Link(second, B, first, B) for first, second in cuts))


def routed(table: Table, links: Iterable[Link]) -> Routes:
    """The messages of a step that runs every action of a table."""
    homes = {action: c for c, row in enumerate(table.rows) for action in actions_of(row)}
    made: dict[tuple[int, Entry], list[Message]] = {}
    taken: dict[tuple[int, Entry], list[Message]] = {}
    for link in links:
        for message in _of_link(link, table, homes):
            made.setdefault((message.source, message.made_by), []).append(message)
            taken.setdefault((message.target, message.taken_by), []).append(message)
    return Routes(_frozen(made), _frozen(taken))


def _frozen(
    found: Mapping[tuple[int, Entry], Sequence[Message]],
) -> dict[tuple[int, Entry], tuple[Message, ...]]:
    return {key: tuple(messages) for key, messages in found.items()}


def _of_link(link: Link, table: Table, homes: Mapping[Action, int]) -> Iterator[Message]:
    source, target = link.source_phase, link.target_phase
    for i in range(1 if source.once else table.microbatches):
        if source in LOOPED:
            home = homes[Action(source, link.source, i)]
            if target in LOOPED:
                yield Message(link, i, home, homes[Action(target, link.target, i)])
            elif table.microbatches == 1:
                yield from (Message(link, i, home, c) for c in table.holders[link.target])
            else:
                raise _unequal(link)
        elif target in LOOPED or source.once != target.once:
            raise _unequal(link)
        else:
            sources, targets = table.holders[link.source], table.holders[link.target]
            # From stage to stage within a copy; or from the copies of a stage to one another.
            ends = zip(sources, targets[:: -1 if link.source == link.target else 1], strict=True)
            yield from (Message(link, i, *pair) for pair in ends)


def _unequal(link: Link) -> PassError:
    return PassError(
        f"the graphs of `{link}` do not run equally often", help="report this: it is a bug"
    )

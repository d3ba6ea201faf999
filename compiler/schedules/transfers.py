"""What the stages of a program send one another, and the wires that carry it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import TypeAlias

from meshwright.compiler.graph.ir import InputKind, Node
from meshwright.compiler.layout.mesh import Mesh
from meshwright.compiler.layout.wires import Wire
from meshwright.compiler.schedules.actions import Entries, Receive, Send, actions_of
from meshwright.compiler.schedules.beside import Ends, ends
from meshwright.compiler.schedules.links import links_of
from meshwright.compiler.schedules.settled import settled
from meshwright.compiler.stages import Stage
from meshwright.dsl.errors import plural

PassedKey: TypeAlias = tuple[InputKind, str, int]
"""A value of one stage for another: what it is to the stage that takes it, its name, and its
microbatch."""


class Transfers:
    """The values that stages send one another, by link, in the order in which they are sent.

    `axes` are those of the pipeline. Wires are numbered from `first_wire`, one number per value.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        entries: Entries,
        mesh: Mesh,
        axes: tuple[str, ...],
        first_wire: int,
    ) -> None:
        self.stages, self.entries, self.mesh, self.axes = stages, entries, mesh, axes
        inputs = {
            node.args: node for s in stages for phase in s.graphs for node in s.received(phase)
        }
        self.values = {
            link: tuple(inputs[value] for value in values)
            for link, values in links_of(stages).items()
        }
        """By link: the inputs that take them."""
        moved = [node for nodes in self.values.values() for node in nodes]
        self.names = tuple(node.args[1] for node in moved)
        """By number of the wire: the name of the value."""
        self._numbers = {node: number for number, node in enumerate(moved, first_wire)}

    def __repr__(self) -> str:
        over = ", ".join(self.axes)
        return f"<Transfers: {plural(len(self.names), 'value')} over ({over})>"

    def wires(self, rank: int, entry: Send | Receive) -> list[tuple[Node, Wire]]:
        """The values of an entry in the schedule of `rank`, each with its wire."""
        here = self.mesh.position(self.mesh.coords(rank), self.axes)
        ends = (here, entry.peer) if isinstance(entry, Send) else (entry.peer, here)
        channel = "backward" if entry.link.backward else "forward"
        return [
            (
                node,
                Wire("transfer", self.axes, index=self._numbers[node], ends=ends, channel=channel),
            )
            for node in self.values[entry.link]
        ]

    def leaving(self, rank: int) -> Counter[PassedKey]:
        """How many other ranks take each value that `rank` sends."""
        return Counter(self._moved(rank, Send))

    def staying(self, rank: int) -> set[PassedKey]:
        """The values that `rank` hands over to itself."""
        taken = {
            (*node.args, action.microbatch)
            for action in actions_of(self.entries[rank])
            for node in self.stages[action.stage].received(action.kind)
        }
        return taken.difference(self._moved(rank, Receive))

    def _moved(self, rank: int, kind: type[Send] | type[Receive]) -> Iterator[PassedKey]:
        """The values that `rank` sends, or receives."""
        for entry in self.entries[rank]:
            if isinstance(entry, kind):
                yield from ((*node.args, entry.microbatch) for node in self.values[entry.link])

    @property
    def every_wire(self) -> Iterator[Wire]:
        """The wires of a step, on all ranks, repeats included."""
        for rank, entries in self.entries.items():
            for entry in entries:
                if isinstance(entry, Send):
                    yield from (wire for _, wire in self.wires(rank, entry))

    def settled(self, rank: int) -> Mapping[int, tuple[int, ...]]:
        """By the place of an action in the schedule of `rank`: the places of the sends of which it
        then knows that they have arrived."""
        here = self.mesh.position(self.mesh.coords(rank), self.axes)
        return self._settled[here]

    def ends(self, rank: int) -> Ends:
        """When the actions in the schedule of `rank` end that go on beside others."""
        return ends(self.entries[rank], self.values.keys())

    @cached_property
    def _settled(self) -> tuple[Mapping[int, tuple[int, ...]], ...]:
        return settled([self.entries[rank] for rank in self.mesh.group(0, self.axes)])

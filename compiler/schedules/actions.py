"""The entries of a schedule: actions, which run graphs, and moves from rank to rank.

A rank runs its entries in order. It never waits at a send, nor at a receive, but where an action
takes a value that has not come yet.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from meshwright.compiler.graph.ir import Phase


@dataclass(frozen=True, slots=True)
class Action:
    """Run the graph of phase `kind` of a stage on one microbatch."""

    kind: Phase
    stage: int
    microbatch: int = 0

    def __str__(self) -> str:
        """`forward 0` or, of a microbatch other than the first, `forward 0 of microbatch 2`."""
        return f"{self.kind.value} {self.stage}{_of(self.microbatch)}"


@dataclass(frozen=True, slots=True)
class Link:
    """The values that one graph of a stage makes and one graph of another stage takes."""

    source: int
    source_phase: Phase
    target: int
    target_phase: Phase

    @property
    def backward(self) -> bool:
        """Whether the values are made in the backward half of a step.

        Values of either half of a step have a channel of their own between two ranks, on which
        they come in the order in which they were sent.
        """
        return self.source_phase.backward

    def __str__(self) -> str:
        """`forward 0 -> forward 1`."""
        ends = (self.source_phase, self.source), (self.target_phase, self.target)
        return " -> ".join(f"{phase.value} {stage}" for phase, stage in ends)


@dataclass(frozen=True, slots=True)
class Send:
    """Send the values of a link, of one microbatch, to the rank at coordinate `peer` along the
    pipeline, all other coordinates being equal."""

    link: Link
    microbatch: int
    peer: int

    def __str__(self) -> str:
        """`send forward 0 -> forward 1 of microbatch 2 to 1`."""
        return f"send {self.link}{_of(self.microbatch)} to {self.peer}"


@dataclass(frozen=True, slots=True)
class Receive:
    """Begin to receive the values of a link, of one microbatch, from the rank at coordinate `peer`
    along the pipeline, all other coordinates being equal."""

    link: Link
    microbatch: int
    peer: int

    def __str__(self) -> str:
        """`receive forward 0 -> forward 1 of microbatch 2 from 0`."""
        return f"receive {self.link}{_of(self.microbatch)} from {self.peer}"


Entry: TypeAlias = "Action | Send | Receive"
Entries: TypeAlias = "Mapping[int, tuple[Entry, ...]]"
"""Those of each rank, in the order in which it runs them."""


def actions_of(entries: Iterable[Entry]) -> tuple[Action, ...]:
    """The entries that run graphs."""
    return tuple(entry for entry in entries if isinstance(entry, Action))


def _of(microbatch: int) -> str:
    return f" of microbatch {microbatch}" if microbatch else ""

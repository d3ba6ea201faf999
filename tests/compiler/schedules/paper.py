"""Ranks that walk a table on paper, by what entries mean and nothing else.

A value is the text of how it was computed. Sends and receives never wait; between two ranks the
k-th send of each half of a step fills the k-th receive. An action waits for what it takes.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Generator, Iterable, Sequence
from typing import Any

from meshwright.compiler.graph.ir import Phase
from meshwright.compiler.schedules.actions import Action, Entry, Link, Send

NEEDS = {
    Phase.BEFORE: [Phase.COUNT],
    Phase.FORWARD: [Phase.BEFORE, Phase.COUNT],
    Phase.BACKWARD: [Phase.FORWARD],
    Phase.WEIGHT: [Phase.BACKWARD],
    Phase.AFTER: [Phase.WEIGHT],
    Phase.RESULTS: [Phase.AFTER],
}
"""The phases of the same stage whose values a phase takes."""


class Wrong(Exception):
    """A rank takes what is not there, or has something left."""


class Paper:
    """All ranks, with what runs on each and how many microbatches there are."""

    def __init__(
        self, rows: Sequence[Sequence[Entry]], links: Iterable[Link], graphs: Any, turns: int
    ) -> None:
        self.rows, self.links, self.graphs, self.turns = rows, list(links), graphs, turns
        self.channels: dict[Any, deque[str]] = defaultdict(deque)
        self.awaited: dict[Any, deque[Any]] = defaultdict(deque)
        self.results: Counter[Any] = Counter()

    def run(self) -> Counter[Any]:
        """What every rank has run and computed. Raises `Wrong`, for a hang too."""
        ranks = [self.rank(c, row) for c, row in enumerate(self.rows)]
        while ranks:
            steps = [next(rank, "done") for rank in ranks]
            for key in list(self.awaited):
                while self.awaited[key] and self.channels[key]:
                    store, slot = self.awaited[key].popleft()
                    store[slot] = self.channels[key].popleft()
                    steps.append("ran")
            ranks = [rank for rank, step in zip(ranks, steps, strict=False) if step != "done"]
            if ranks and set(steps) == {"waits"}:
                raise Wrong("hangs")
        if any(self.channels.values()) or any(self.awaited.values()):
            raise Wrong("hangs at the end")
        return self.results

    def rank(self, c: int, row: Sequence[Entry]) -> Generator[str, None, None]:
        saved: dict[Action, str] = {}
        passed: dict[Any, str | None] = {}
        sums: dict[int, list[str]] = defaultdict(list)
        for entry in row:
            if not isinstance(entry, Action):
                self.move(c, entry, saved, passed)
                yield "ran"
                continue
            received = []
            for link in self.links:
                if (link.target, link.target_phase) == (entry.stage, entry.kind):
                    source = Action(link.source_phase, link.source, entry.microbatch)
                    if (link, entry.microbatch) not in passed:
                        received.append(found(saved, source))  # of the same rank
                        continue
                    while passed[link, entry.microbatch] is None:
                        yield "waits"
                    received.append(str(passed.pop((link, entry.microbatch))))
            value = f"{entry}({', '.join(received + self.taken(entry, saved, sums))})"
            if entry.kind is Phase.WEIGHT:
                sums[entry.stage].append(value)
            saved[entry] = str(hash(value))
            self.results[c, value] += 1
            yield "ran"

    def move(self, c: int, entry: Any, saved: dict[Action, str], passed: dict[Any, Any]) -> None:
        link, i = entry.link, entry.microbatch
        if isinstance(entry, Send):
            value = found(saved, Action(link.source_phase, link.source, i))
            self.channels[c, entry.peer, link.backward].append(f"{link}: {value}")
        else:
            if (link, i) in passed:
                raise Wrong("received twice")
            passed[link, i] = None
            self.awaited[entry.peer, c, link.backward].append((passed, (link, i)))

    def taken(self, action: Action, saved: dict[Action, str], sums: Any) -> list[str]:
        values = []
        for kind in NEEDS.get(action.kind, ()):
            if (action.stage, kind) not in self.graphs:
                continue
            if kind is Phase.WEIGHT:
                values += sorted(sums[action.stage])
            elif kind is Phase.COUNT:
                turns = range(self.turns)
                values += [found(saved, Action(kind, action.stage, i)) for i in turns]
            else:
                turn = 0 if kind.once else action.microbatch
                values.append(found(saved, Action(kind, action.stage, turn)))
        return values


def found(saved: dict[Action, str], action: Action) -> str:
    if action not in saved:
        raise Wrong(f"{action} has not run here")
    return saved[action]

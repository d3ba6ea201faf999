"""What the graphs of a stage save for later ones, while their instructions are walked."""

from __future__ import annotations

from dataclasses import replace

from meshwright.compiler.graph.ir import Node
from meshwright.compiler.report.memory.tensors import Held, Local, Storage, Use, contiguous, fresh
from meshwright.compiler.schedules.actions import Action
from meshwright.compiler.stages import Joined, Stage


class Saved:
    """The values that graphs of a stage have saved for later ones, as the executor keeps them."""

    def __init__(self, stage: Stage) -> None:
        self.stage, self.mesh = stage, stage.forward.mesh
        self.turns = len(self.mesh.turns)
        self.by_microbatch: list[dict[int, Held]] = [{} for _ in range(self.turns)]
        # Without a loop, what runs once takes what the only turn has saved.
        self.once: dict[int, Held] = {} if self.turns > 1 else self.by_microbatch[0]
        self.joined = stage.joined

    def of(self, action: Action) -> dict[int, Held]:
        """What an action takes from, and adds to."""
        return self.once if action.kind.once else self.by_microbatch[action.microbatch]

    def give_totals(self, action: Action) -> list[Held]:
        """Hand an action the totals that it adds to. Returns what is held from here on, once for
        each place where it is."""
        held: list[Held] = []
        for number in self.stage.added(action.kind):
            if number not in self.once:
                value = self.joined[number].value
                shape = value.placed.local_shape(self.mesh)
                local = fresh(shape, value.tensor.dtype, value, Use.GRADIENTS)
                outside = replace(local, storage=Storage(0))
                self.once[number] = local if self.joined[number].place is None else outside
                held.append(self.once[number])
            self.by_microbatch[action.microbatch][number] = self.once[number]
            held.append(self.once[number])
        return held

    def buckets(self, action: Action) -> list[Node]:
        """The buckets in which an action adds up gradients."""
        found = (self.joined[number].place for number in self.stage.added(action.kind))
        return [place[0] for place in found if place is not None]

    def held(self) -> tuple[Held, ...]:
        """All that is saved, once for each place where it is."""
        places = self.by_microbatch if self.turns == 1 else (self.once, *self.by_microbatch)
        return tuple(held for own in places for held in own.values())

    def hand_over(self, action: Action) -> tuple[Held, Held]:
        """Share what was made once, or join what one microbatch has made. Returns what was held
        before, and what is held after."""
        before = self.held()
        if action.kind.once:
            for each in self.by_microbatch:
                each.update(self.once)
            return before, self.held()
        own = self.by_microbatch[action.microbatch]
        for number in self.joined.keys() & own.keys():
            value = own.pop(number)
            if number not in self.once:
                assert isinstance(value, Local)
                self.once[number] = self._total(value, self.joined[number])
        return before, self.held()

    def _total(self, value: Local, joined: Joined) -> Local:
        """Where the values of all microbatches end; buckets lie outside of what is counted."""
        if joined.place is not None:
            return replace(value, stride=contiguous(value.shape), storage=Storage(0))
        shape = (self.turns, *value.shape) if joined.gathers else value.shape
        return fresh(shape, value.dtype, joined.value, Use.GRADIENTS)

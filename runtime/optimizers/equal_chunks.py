"""Try out the update of equal chunks once: what one takes, each of them does.

Of chunks that are alike two are updated in each step, since the first may make what all of them
use, and the others take what the second does.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from meshwright.compiler.program import Place
from meshwright.compiler.report.memory.scratch import OperatorCall
from meshwright.runtime.optimizers.chunks import Away, Chunks
from meshwright.runtime.optimizers.rounding import Widened


@dataclass(slots=True)
class Took:
    """The bytes that a part of an update leaves, the most that it has besides what was there
    before, and the same after each kind of call."""

    kept: int = 0
    peak: int = 0
    calls: Mapping[OperatorCall, int] = field(default_factory=dict)


class Counting(Protocol):
    """Counts the bytes of an update."""

    def part(self) -> AbstractContextManager[Took]:
        """Count what is done meanwhile as ever, and what it takes by itself."""
        ...

    def again(self, took: Took) -> None:
        """Count what took as much as an earlier part."""
        ...


class EqualChunks(Chunks):
    """Chunks of fake tensors. `alike` is given the name of each parameter that is not updated, with
    that of one whose state is as large."""

    def __init__(
        self,
        counter: Counting,
        alike: dict[str, str],
        optimizer: Optimizer,
        away: Sequence[Away],
        widened: Widened,
    ) -> None:
        super().__init__(optimizer, away, widened)
        self._counter, self._alike = counter, alike
        self._taken: dict[Hashable, list[Took]] = {}
        """What chunks of one kind have taken in this step."""
        self._second: dict[Hashable, list[str]] = {}
        """The parameters of the second of each kind."""

    def _run(self, step: Callable[[], Any]) -> None:
        self._taken.clear()
        super()._run(step)

    def _update(
        self,
        chunk: Sequence[nn.Parameter],
        before: Sequence[dict[str, Any]],
        groups: Sequence[dict[str, Any]],
        step: Callable[[], Any],
    ) -> None:
        members = [self.away[id(parameter)] for parameter in chunk]
        group_of = {id(p): i for i, group in enumerate(before) for p in group["params"]}
        kind = tuple((group_of[id(each.parameter)], *_looks(each)) for each in members)
        names = [each.name for each in members]
        taken = self._taken.setdefault(kind, [])
        if len(taken) < 2:
            with self._counter.part() as took:
                super()._update(chunk, before, groups, step)
            taken.append(took)
            self._second[kind] = names
        else:
            self._counter.again(taken[-1])
            self._alike.update(zip(names, self._second[kind], strict=True))

    def _tensors(self, away: Away) -> Iterator[tuple[Place, Tensor]]:
        """Nothing is read or written."""
        return iter(())


def _looks(away: Away) -> tuple[Hashable, ...]:
    """All of a parameter that an update depends on but for its values and its name."""
    stored = away.state.stored["parameter", away.name]
    return stored.type, stored.layout, tuple(stored.paddings), stored.kept

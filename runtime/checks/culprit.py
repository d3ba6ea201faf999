"""Run a step again and find the node that first made a NaN or an infinity: on which rank, and how.

From a bad loss or gradient the search goes back along bad operands. A NaN comes from NaN operands:
a node that makes one of finite values, or of infinities, is where it began, so a mask of -inf that
a softmax takes in is not to blame. What a collective brought from another rank is blamed there.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from meshwright.compiler.codegen.linking import RankContext
from meshwright.compiler.codegen.printing import Code, printed
from meshwright.compiler.codegen.watching import Flow, Place, Watch, watched
from meshwright.compiler.graph.ir import INPUT, InputKind, Node
from meshwright.compiler.graph.text import op_text
from meshwright.compiler.layout.wires import Wire
from meshwright.compiler.public import Program
from meshwright.compiler.stages import PASSED_AS
from meshwright.runtime.offloading.stores import Resident
from meshwright.runtime.rank import RankProgram, RankState
from meshwright.runtime.world.agreement import told

Key = tuple[Place, int]
"""A value of a run: its place, and the turn of the sequential axes in which it was made."""
_NONE = 1 << 40


@dataclass(frozen=True, slots=True)
class _Bad:
    """A value that is not finite: when it was seen, and whether it has a NaN."""

    order: int
    nan: bool


class Watches:
    """The code of a program with its values watched, and what each rank saw in the last run."""

    def __init__(self, program: Program) -> None:
        self.program, self.mesh = program, program.mesh
        self.bad: dict[int, dict[Place, dict[int, _Bad]]] = {}
        """By rank and place: the values that are not finite, by turn."""
        self.phases = [phase for stage in program.stages for phase in stage.graphs]
        self.turns = program.stages[0].forward.mesh.turns
        self._counts: dict[int, Iterator[int]] = {}

    @cached_property
    def codes(self) -> list[Code]:
        """The code of each graph."""
        return [
            printed(watched(each, partial(self._linked, number)))
            for number, each in enumerate(self.program.instructions)
        ]

    @cached_property
    def flow(self) -> Flow:
        """Where each value comes from."""
        stages = [stage.number for stage in self.program.stages for _ in stage.graphs]
        sent = [
            {
                i: (PASSED_AS[o.kind], o.name)
                for i, o in enumerate(graph.results)
                if o.kind in PASSED_AS
            }
            for graph in self.program.graphs().values()
        ]
        return Flow(self.program.instructions, tuple(stages), tuple(sent))

    def _linked(self, graph: int, context: RankContext) -> Watch:
        mesh = context.mesh
        rank = self.mesh.rank({name: context.coords[name] for name in self.mesh.names})
        own = {name: context.coords[name] for name in mesh.names if name in mesh.sequential}
        turn = mesh.turns.index(own)
        bad, count = self.bad.setdefault(rank, {}), self._counts.setdefault(rank, itertools.count())

        def watch(number: int, value: Any) -> None:
            order, nan = next(count), _has_nan(value)
            if nan is not None:
                bad.setdefault((graph, number), {})[turn] = _Bad(order, nan)

        return watch

    def first(self, rank: int) -> _Found | None:
        """Where the first bad value of a rank began, as far as this rank can tell."""
        return _Search(self, self.bad.get(rank, {})).first()


def _has_nan(value: Any) -> bool | None:
    """Whether a value has a NaN; None if all of it is finite."""
    if isinstance(value, Resident):
        value = value.tensor
    if isinstance(value, (tuple, list)):
        kinds = [kind for each in value if (kind := _has_nan(each)) is not None]
        return any(kinds) if kinds else None
    if not isinstance(value, Tensor) or value.isfinite().all():
        return None
    return bool(value.isnan().any())


@dataclass(frozen=True, slots=True)
class _Found:
    """Where a bad value began. `level` is 0 for one that reaches what the step returns, 1 for one
    that was sent to other ranks, 2 for one that came from them; `infinite` is where the infinities
    began of which it made a NaN."""

    level: int
    key: Key
    bad: _Bad
    infinite: Key | None


class _Search:
    """The search on one rank, back from what the step returns."""

    def __init__(self, watches: Watches, bad: dict[Place, dict[int, _Bad]]) -> None:
        self.flow, self.phases, self.bad = watches.flow, watches.phases, bad

    def first(self) -> _Found | None:
        for level, places in enumerate((self.flow.ends, self.flow.given)):
            begun = self.origins(self.keys(places))
            own = [key for key in begun if key[0] not in self.flow.received]
            if own:
                return self.found(level, own)
        foreign = list(self.keys(self.flow.received))
        return self.found(2, foreign) if foreign else None

    def keys(self, places: Iterable[Place]) -> Iterator[Key]:
        """The bad values at these places."""
        for place in places:
            for turn in self.bad.get(place, ()):
                yield place, turn

    def at(self, key: Key) -> _Bad:
        place, turn = key
        return self.bad[place][turn]

    def found(self, level: int, keys: Iterable[Key]) -> _Found:
        """The first of these values."""
        key = self.earliest(keys)
        assert key is not None
        infinite = self.earliest(self.origins(self.sources(key)) if self.at(key).nan else [])
        if infinite is not None and self.flow.nodes[infinite[0]].args[:1] == (InputKind.PARAMETER,):
            # A mask may well be infinite, and a parameter may not.
            return _Found(level, infinite, self.at(infinite), None)
        return _Found(level, key, self.at(key), infinite)

    def earliest(self, keys: Iterable[Key]) -> Key | None:
        return min(keys, key=lambda key: self.at(key).order, default=None)

    def origins(self, starts: Iterable[Key]) -> list[Key]:
        """Where the bad values of `starts` began: bad values that no operand explains.

        A NaN is explained by a NaN, an infinity by either.
        """
        left = list(starts)
        known, found = set(left), []
        while left:
            key = left.pop()
            nan = self.at(key).nan
            causes = [each for each in self.sources(key) if self.at(each).nan or not nan]
            if not causes:
                found.append(key)
            left += [each for each in causes if each not in known]
            known.update(causes)
        return found

    def sources(self, key: Key) -> Iterator[Key]:
        """The bad values that a bad value was made of: in the same turn or, where one of the two
        graphs runs once for all of them, in any."""
        place, turn = key
        for source in self.flow.sources.get(place, ()):
            apart = self.phases[place[0]].once != self.phases[source[0]].once
            for other in self.bad.get(source, ()):
                if apart or other == turn:
                    yield source, other


def culprit(state: RankState, watches: Watches) -> RankProgram:
    """What made the first bad value on any rank, as the arguments of the error that says so, the
    same on every rank; None where all that ranks have seen is finite."""
    found = watches.first(state.rank)
    numbers = [_NONE, _NONE] if found is None else [found.level, found.bad.order]
    own = torch.tensor(numbers, device=state.device)
    every = (yield Wire("all_gather", state.mesh.names), own).tolist()
    rank = min(range(len(every)), key=every.__getitem__)
    if every[rank][0] == _NONE:
        return None
    text = ""
    if state.rank == rank:
        assert found is not None
        text = json.dumps(_spelled(found, watches, rank))
    text = yield from told(state, text, rank)
    return {"rank": rank, **json.loads(text)}


def _spelled(found: _Found, watches: Watches, rank: int) -> dict[str, Any]:
    """What an error says of a place where a bad value began."""
    place, turn = found.key
    node, graph = watches.flow.nodes[place], watches.program.instructions[place[0]].name
    kind = "a NaN" if found.bad.nan else "an infinity"
    if node.op == INPUT:
        help = f"check where it comes from; {_UNCHANGED}"
        return {"problem": f"{_maker(node)} has {kind} on rank {rank}", "where": (), "help": help}
    where = [f"node `{node.name}` of `{graph}`"]
    if len(watches.turns) > 1 and not watches.phases[place[0]].once:
        where[0] += f", microbatch {turn}"
    if node.origin.source:
        where.append(node.origin.source)
    if found.infinite is not None:
        other = watches.flow.nodes[found.infinite[0]]
        verb = "has" if other.op == INPUT else "made"
        where.append(f"it took in an infinity that {_maker(other)} {verb}")
    problem = f"{_maker(node)} made {kind} on rank {rank}"
    return {"problem": problem, "where": where, "help": f"{_CHECK}; {_UNCHANGED}"}


_CHECK = "check what that operator takes in, or lower the learning rate"
_UNCHANGED = "nothing was updated, and after `zero_grad` the run can go on without this batch"


def _maker(node: Node) -> str:
    """A node as errors name it: an input by its name, others by operator and module."""
    if node.op == INPUT:
        kind, name = node.args
        return f"the {'input' if kind == InputKind.ARGUMENT else kind} `{name}`"
    module = f"`{node.origin.module}`" if node.origin.module else "the model"
    return f"`{op_text(node.op)}` in {module}"

"""Order instructions: exchanges start as soon as their operand is there, and are waited for where
their result is read.

Before:  a = all_reduce(x)        After:  h = start all_reduce(x)
         c = f(b)                         free x
         d = g(a, c)                      c = f(b)
                                          a = wait h
                                          free h
                                          d = g(a, c)
                                          free a, c

What exchanges need that depends on no parameter, such as the number of labels, is computed before
all else. The gather of a weight starts where the one before it would: with all of them at the
front, ranks would hold every weight whole. A gradient's bucket is used by the optimizer, after the
backward: its reduction is returned under way. All else keeps its order, and exchanges start in the
same order on every rank.
Elsewhere: DDP's hooks, FSDP's prefetching, Inductor's reordering for compute and communication
overlap.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TypeAlias

from meshwright.compiler.codegen.instructions import (
    BucketView,
    Exchange,
    Free,
    Instruction,
    Instructions,
    Return,
    Save,
    Start,
    Take,
    UnderWay,
    Value,
    Variable,
    Wait,
    reads,
    target,
)
from meshwright.compiler.graph.ir import InputKind

_Place: TypeAlias = "Variable | str"
"""Where a value is: a variable, or the bucket of a name."""


def overlap(instructions: Instructions) -> Instructions:
    """The same work with early starts and late waits, and each value freed after its last use."""
    body = _Waits(_with_early_starts(instructions)).run()
    return replace(instructions, body=tuple(_with_frees(body, instructions.inputs)))


def _with_early_starts(instructions: Instructions) -> list[Instruction]:
    """The instructions, with each exchange moved up to where its operand is made."""
    body, inputs = instructions.body, instructions.inputs
    weights = {v for v, node in inputs.items() if node.args[0] == InputKind.PARAMETER}
    gathers = [i for i, each in _exchanges(body) if each.source in weights]
    following = dict(pairwise(gathers))
    followers = _followers(body)
    order: dict[int, None] = {}

    def put(i: int) -> None:
        if i not in order:
            order[i] = None
            for follower in followers.get(i, ()):
                put(follower)

    for i in (*gathers[:1], *_early(body, inputs.keys() - weights)):
        put(i)
    for i in range(len(body)):
        put(i)
        if i in following:
            put(following[i])
    return [body[i] for i in order]


def _exchanges(body: Sequence[Instruction]) -> Iterator[tuple[int, Exchange]]:
    return ((i, each) for i, each in enumerate(body) if isinstance(each, Exchange))


def _followers(body: Sequence[Instruction]) -> dict[int, list[int]]:
    """The exchanges by what makes their operand; in a bucket, by what makes its last part."""
    last: dict[_Place, int] = {}
    found: dict[int, list[int]] = {}
    for i, each in enumerate(body):
        if isinstance(each, Exchange) and _place(each.source) in last:
            found.setdefault(last[_place(each.source)], []).append(i)
        if (made := target(each)) is not None:
            last[_place(made)] = i
    return found


def _early(body: Sequence[Instruction], given: Iterable[Variable]) -> list[int]:
    """What exchanges need that depends on no parameter, and these exchanges."""
    ready: set[Value | None] = set(given)
    for each in body:
        if not isinstance(each, Take) and ready.issuperset(reads(each)):
            ready.add(target(each))
    wanted: set[Value | None] = set()
    found: list[int] = []
    for i, each in reversed(list(enumerate(body))):
        made = target(each)
        if made in ready and (isinstance(each, Exchange) or made in wanted):
            wanted.update(reads(each))
            found.append(i)
    return found[::-1]


class _Waits:
    """Parts exchanges into starts and waits, and puts each wait before what reads the result."""

    def __init__(self, body: Sequence[Instruction]) -> None:
        self.body = body
        self.result: list[Instruction] = []
        self.waiting: dict[_Place, Wait] = {}
        """What is under way, by where it ends."""

    def run(self) -> list[Instruction]:
        for each in self.body:
            if isinstance(each, Return):
                each = self._returned(each)
            self._need(reads(each))
            if isinstance(each, Exchange):
                wait = Wait(Variable(f"{each.target.name}_handle"), each)
                self.waiting[_place(each.into or each.target)] = wait
                each = Start(wait.handle, each)
            self.result.append(each)
        return self.result

    def _need(self, values: Iterable[Value]) -> None:
        """Put the waits for what is under way; one right after its start makes it an exchange."""
        for value in values:
            wait = self.waiting.pop(_place(value), None)
            last = self.result[-1] if self.result else None
            if wait and isinstance(last, Start) and last.exchange is wait.exchange:
                self.result[-1] = wait.exchange
            elif wait:
                self.result.append(wait)

    def _returned(self, found: Return) -> Return:
        """Leave the wait for what is returned once, as it came, to whoever called."""
        times = Counter(found.results)
        results = [each if times[each] > 1 else self._under_way(each) for each in found.results]
        last = self.result[-1] if self.result else None
        if isinstance(last, Start) and last.exchange.into:
            # Nothing is left that this one could overlap with.
            self._need((last.exchange.into,))
        reductions = [wait for place, wait in self.waiting.items() if type(place) is str]
        return Return(tuple(results), tuple(UnderWay(w.handle, w.exchange) for w in reductions))

    def _under_way(self, value: Value | UnderWay) -> Value | UnderWay:
        wait = self.waiting.get(value) if isinstance(value, Variable) else None
        if wait is None or wait.exchange.after:
            return value
        del self.waiting[wait.exchange.target]
        return UnderWay(wait.handle, wait.exchange)


def _place(value: Value) -> _Place:
    return value.bucket if isinstance(value, BucketView) else value


def _with_frees(body: Sequence[Instruction], kept: Iterable[Variable]) -> list[Instruction]:
    """The instructions, with variables freed after the last one that mentions them.

    What the last instructions hand over is gone with the function.
    """
    last: dict[Variable, int] = {}
    for i, each in enumerate(body):
        for value in (*reads(each), target(each)):
            if isinstance(value, Variable):
                last[value] = i
    freed: dict[int, list[Variable]] = {}
    for variable in last.keys() - set(kept):
        freed.setdefault(last[variable], []).append(variable)
    result: list[Instruction] = []
    for i, each in enumerate(body):
        result.append(each)
        if i in freed and not isinstance(each, (Save, Return)):
            result.append(Free(tuple(sorted(freed[i], key=lambda variable: variable.name))))
    return result

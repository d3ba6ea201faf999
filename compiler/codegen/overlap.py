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
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TypeAlias

from meshwright.compiler.codegen.instructions import (
    BucketView,
    Call,
    Copy,
    Exchange,
    Free,
    Instruction,
    Instructions,
    Rearrange,
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
    body = _Waits(_Starts(instructions).run()).run()
    return replace(instructions, body=tuple(_with_frees(body, instructions.inputs)))


class _Starts:
    """Moves each exchange up to where its operand is made."""

    def __init__(self, instructions: Instructions) -> None:
        self.body = instructions.body
        self.order: dict[int, None] = {}
        """The places in `body` of the instructions in their new order."""
        inputs = instructions.inputs
        weights = {v for v, node in inputs.items() if node.args[0] == InputKind.PARAMETER}
        gathers = self._gathers(weights)
        self.first = (*gathers[:1], *self._early(inputs.keys() - weights))
        self.following = dict(pairwise(gathers))
        """The gather of a weight after each."""
        self.makers: dict[_Place, list[int]] = {}
        """What makes a value; of a bucket, each of its parts."""
        self.followers: dict[int, list[int]] = {}
        """Exchanges by what makes their operand, or the last part of it."""
        for i, each in enumerate(self.body):
            if isinstance(each, Exchange):
                for maker in self.makers.get(_place(each.source), ())[-1:]:
                    self.followers.setdefault(maker, []).append(i)
            if (made := _made(each)) is not None:
                self.makers.setdefault(made, []).append(i)

    def _early(self, given: Iterable[Variable]) -> list[int]:
        """What exchanges need that depends on no parameter, and these exchanges."""
        ready: set[Value] = set(given)
        for each in self.body:
            made = target(each)
            if made and not isinstance(each, Take) and ready.issuperset(reads(each)):
                ready.add(made)
        wanted: set[Value] = set()
        found: list[int] = []
        for i in reversed(range(len(self.body))):
            each = self.body[i]
            made = target(each)
            if made in ready and (isinstance(each, Exchange) or made in wanted):
                wanted.update(reads(each))
                found.append(i)
        return found[::-1]

    def _gathers(self, weights: Iterable[Variable]) -> list[int]:
        """The exchanges that take weights as they are stored, or a rank's part of them."""
        stored: set[Value] = set(weights)
        found: list[int] = []
        for i, each in enumerate(self.body):
            if isinstance(each, Rearrange) and each.source in stored:
                stored.add(each.target)
            elif isinstance(each, Exchange) and each.source in stored:
                found.append(i)
        return found

    def run(self) -> list[Instruction]:
        for i in self.first:
            self._put(i)
        for i in range(len(self.body)):
            self._put(i)
            if i in self.following:
                self._put(self.following[i])
        return [self.body[i] for i in self.order]

    def _put(self, i: int) -> None:
        if i in self.order:
            return
        for place in dict.fromkeys(map(_place, reads(self.body[i]))):
            for maker in self.makers.get(place, ()):
                self._put(maker)
        self.order[i] = None
        for follower in self.followers.get(i, ()):
            self._put(follower)


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


def _made(instruction: Instruction) -> _Place | None:
    """What an instruction gives a value, or a part of it."""
    match instruction:
        case Call(out=BucketView(bucket=bucket)) | Copy(out=BucketView(bucket=bucket)):
            return bucket
        case _:
            return target(instruction)


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

"""Order instructions: waits stand where their results are used, frees where values are not.

Before:  a = all_reduce(x)        After:  h = start all_reduce(x)
         c = f(b)                         free x
         d = g(a, c)                      c = f(b)
                                          a = wait h
                                          d = g(a, c)
                                          free a, c

A gradient's bucket is used by the optimizer, after the backward: its reduction is returned under
way. Starts keep their order, the same on every rank.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

from meshwright.compiler.codegen.instructions import (
    BucketView,
    Exchange,
    Free,
    Instruction,
    Instructions,
    Rearrange,
    Return,
    Save,
    Start,
    UnderWay,
    Value,
    Variable,
    Wait,
    reads,
    target,
)


def ordered(instructions: Instructions) -> Instructions:
    """The same work with late waits, and with every value freed after its last use."""
    body = _Waits(instructions.body).run()
    return replace(instructions, body=tuple(_with_frees(body, instructions.inputs)))


class _Waits:
    """Parts exchanges into starts and waits, and puts each wait before what reads the result."""

    def __init__(self, body: Sequence[Instruction]) -> None:
        self.body = body
        self.result: list[Instruction] = []
        self.waiting: dict[Variable | str, list[Instruction]] = {}
        """By variable, or bucket, that is under way: the wait, and the steps after it."""

    def run(self) -> list[Instruction]:
        for each in self.body:
            if isinstance(each, Exchange):
                self._need(reads(each))
                start = Start(Variable(f"{each.target.name}_handle"), each)
                self.waiting[_key(each)] = [Wait(start.handle, each)]
                self.result.append(start)
            elif isinstance(each, Rearrange) and each.target in self.waiting:
                self.waiting[each.target].append(each)
            else:
                if isinstance(each, Return):
                    each = self._returned(each)
                self._need(reads(each))
                self.result.append(each)
        return self.result

    def _need(self, values: Iterable[Value]) -> None:
        for value in values:
            key = value.bucket if isinstance(value, BucketView) else value
            for each in self.waiting.pop(key, ()):
                self._wait(each)

    def _wait(self, each: Instruction) -> None:
        """Put a wait; one right after its start makes it an exchange again."""
        last = self.result[-1]
        if isinstance(each, Wait) and isinstance(last, Start) and last.handle == each.handle:
            self.result[-1] = each.exchange
        else:
            self.result.append(each)

    def _returned(self, found: Return) -> Return:
        """Leave the wait for what is returned once, as it came, to whoever called."""
        times = Counter(each for each in found.results if isinstance(each, Variable))
        results = tuple(
            self._under_way(each) if isinstance(each, Variable) and times[each] == 1 else each
            for each in found.results
        )
        last = self.result[-1] if self.result else None
        if isinstance(last, Start) and last.exchange.into:
            # Nothing is left that this one could overlap with.
            self._need((last.exchange.into,))
        reductions = [self.waiting.pop(key)[0] for key in list(self.waiting) if type(key) is str]
        under_way = (UnderWay(w.handle, w.exchange) for w in reductions if isinstance(w, Wait))
        return Return(results, tuple(under_way))

    def _under_way(self, value: Variable) -> Variable | UnderWay:
        match self.waiting.get(value):
            case [Wait(handle, exchange)]:
                del self.waiting[value]
                return UnderWay(handle, exchange)
        return value


def _key(exchange: Exchange) -> Variable | str:
    return exchange.target if exchange.into is None else exchange.into.bucket


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

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
backward: its reduction is returned under way. Of the reductions whose operand is not in a bucket,
and lives until the wait, two are under way at most: the result of the first goes to where it is
kept before the operand of the third is packed. In a pipeline, what a stage runs once starts all its
exchanges, and pauses while the rank runs other stages. All else keeps its order, and exchanges
start in the same order on every rank.
Elsewhere: DDP's hooks, FSDP's prefetching, Inductor's reordering for compute and communication
overlap.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

from meshwright.compiler.codegen.instructions import (
    Allocate,
    BucketView,
    Call,
    Copy,
    Exchange,
    Free,
    Instruction,
    Instructions,
    Item,
    Pause,
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
from meshwright.compiler.graph.ir import InputKind, Node

MOST_UNDER_WAY = 2
"""The most reductions under way that hold a gradient outside of buckets: one is carried while the
next gradient is computed."""


def overlap(instructions: Instructions, *, beside: bool = False) -> Instructions:
    """The same work with early starts and late waits, and each value freed after its last use;
    with `beside`, other graphs run between the starts and the waits."""
    body = _with_early_starts(instructions)
    if beside:
        body = _with_pause(_Waits(_started_first(body), beside=True).run())
    else:
        body = _Waits(body).run()
    body = _with_allocations(body, instructions.buckets)
    return replace(instructions, body=tuple(_with_frees(body, instructions.inputs)))


def _with_early_starts(instructions: Instructions) -> list[Instruction]:
    """The instructions, with each exchange moved up to where its operand is made."""
    body, inputs = instructions.body, instructions.inputs
    weights = {v for v, node in inputs.items() if node.args[0] == InputKind.PARAMETER}
    made = _made_of(body, weights)
    gathers = [
        i
        for i, each in _exchanges(body)
        if (each.source in weights or each.source in made) and each.follows is None
    ]
    following = dict(pairwise(gathers))
    makers = _makers(body)
    followers: dict[int, list[int]] = {}
    for exchange, before in makers.items():
        for i in before:
            followers.setdefault(i, []).append(exchange)
    order: dict[int, None] = {}

    def put(i: int) -> None:
        if i not in order:
            order[i] = None
            for follower in followers.get(i, ()):
                if all(each in order for each in makers[follower]):
                    put(follower)

    def gather(i: int) -> None:
        for value in reads(body[i]):
            if value in made:
                gather(made[value])
        put(i)

    for i in gathers[:1]:
        gather(i)
    for i in _early(body, inputs.keys() - weights):
        put(i)
    for i in range(len(body)):
        put(i)
        if i in following:
            gather(following[i])
    return [body[i] for i in order]


def _made_of(body: Sequence[Instruction], given: Iterable[Variable]) -> dict[Value, int]:
    """What calls make of `given` alone, each with its call."""
    found: dict[Value, int] = {}
    known = set[Value](given)
    for i, each in enumerate(body):
        made = target(each)
        read = set(reads(each))
        if isinstance(each, Call) and made is not None and read and read <= known:
            known.add(made)
            found[made] = i
    return found


def _exchanges(body: Sequence[Instruction]) -> Iterator[tuple[int, Exchange]]:
    return ((i, each) for i, each in enumerate(body) if isinstance(each, Exchange))


def _makers(body: Sequence[Instruction]) -> dict[int, list[int]]:
    """By exchange: what makes its operand, of a whole bucket each part, and what it follows."""
    made_in: dict[Value | str, list[int]] = {}
    found: dict[int, list[int]] = {}
    for i, each in enumerate(body):
        if isinstance(each, Exchange):
            needed = (*reads(each), *([each.follows] if each.follows else []))
            found[i] = [j for value in needed for j in made_in.get(_memory(value), ())]
        made = _ends(each) if isinstance(each, Exchange) else target(each)
        if made is not None:
            made_in.setdefault(_memory(made), []).append(i)
    return found


def _memory(value: Value) -> Value | str:
    """The bucket that a value lies in, or else the value."""
    return value.bucket if isinstance(value, BucketView) else value


def _ends(exchange: Exchange) -> Value:
    """Where the result of an exchange ends."""
    return exchange.into or exchange.target


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
        exchanged = isinstance(each, Exchange) and (each.follows is None or each.follows in ready)
        if made in ready and (exchanged or made in wanted):
            wanted.update(reads(each))
            found.append(i)
    return found[::-1]


def _started_first(body: Iterable[Instruction]) -> list[Instruction]:
    """The instructions, with all that needs no exchange before what needs one."""
    first: list[Instruction] = []
    rest: list[Instruction] = []
    late: set[Value | str] = set()
    for each in body:
        needs = map(_memory, reads(each))
        waits = isinstance(each, (Save, Return)) or not late.isdisjoint(needs)
        for made in (target(each), each.into if isinstance(each, Exchange) else None):
            if made is not None and (waits or isinstance(each, Exchange)):
                late.add(_memory(made))
        (rest if waits else first).append(each)
    return [*first, *rest]


def _with_pause(body: list[Instruction]) -> list[Instruction]:
    """The instructions, with a pause before the first that waits."""
    place = next((i for i, each in enumerate(body) if isinstance(each, Wait)), None)
    return body if place is None else [*body[:place], Pause(), *body[place:]]


class _Waits:
    """Parts exchanges into starts and waits, and puts each wait before what reads the result.

    Where other graphs run `beside`, nothing waits before it is read: there is always something to
    overlap with, and no limit to what is under way.
    """

    def __init__(self, body: Sequence[Instruction], *, beside: bool = False) -> None:
        self.body, self.beside = body, beside
        self.result: list[Instruction] = []
        self.waiting: dict[Value, Wait] = {}
        """What is under way, by where it ends."""
        kept = {v for each in body if isinstance(each, (Save, Copy)) for v in reads(each)}
        read = (v for each in body if not isinstance(each, (Save, Copy)) for v in reads(each))
        self.kept = kept.difference(read)
        """What is only saved for later graphs, or copied into buckets."""
        self.readers: dict[Value, list[int]] = defaultdict(list)
        self.takes: dict[Value, int] = {
            each.target: i for i, each in enumerate(body) if isinstance(each, Take)
        }
        self.put: set[int] = set()
        """The instructions that are in their places; some have moved up to a wait."""
        for i, each in enumerate(body):
            for value in dict.fromkeys(reads(each)):
                self.readers[value].append(i)

    def run(self) -> list[Instruction]:
        for i, each in enumerate(self.body):
            if i in self.put:
                continue
            self.put.add(i)
            following = self.body[i + 1] if i + 1 < len(self.body) else None
            if isinstance(following, Exchange) and following.source == target(each):
                self._limit(following)
            if isinstance(each, Return):
                each = self._returned(each)
            self._need(reads(each))
            if isinstance(each, Exchange):
                self._limit(each)
                wait = Wait(Variable(f"{each.target.name}_handle"), each)
                self.waiting[_ends(each)] = wait
                each = Start(wait.handle, each)
            self.result.append(each)
        return self.result

    def _need(self, values: Iterable[Value]) -> None:
        """Put the waits for what is under way there; one right after its start makes it an
        exchange."""
        for value in values:
            for place in self._under_way_in(value):
                wait = self.waiting.pop(place)
                last = self.result[-1] if self.result else None
                alone = isinstance(last, Start) and last.exchange is wait.exchange
                if alone and not self.beside:
                    self.result[-1] = wait.exchange
                else:
                    self.result.append(wait)

    def _under_way_in(self, value: Value) -> list[Value]:
        """The places of what is under way into a value, or into a part of the bucket."""
        if not isinstance(value, BucketView):
            return [value] if value in self.waiting else []
        views = (place for place in self.waiting if isinstance(place, BucketView))
        own = (place for place in views if place.bucket == value.bucket)
        return [place for place in own if None in (place.index, value.index) or place == value]

    def _limit(self, exchange: Exchange) -> None:
        """Wait for the first of the reductions under way that hold gradients, if there are many."""
        if not self.beside and self._holds_gradient(exchange):
            holding = [p for p, wait in self.waiting.items() if self._holds_gradient(wait.exchange)]
            for place in holding[: max(len(holding) + 1 - MOST_UNDER_WAY, 0)]:
                self._settle(place)

    def _settle(self, place: Value) -> None:
        """Wait for what is under way into a place, and bring it to where it is kept."""
        moved: set[int] = set()
        made = [self.waiting[place].exchange.target]
        self._need((place,))
        for value in made:
            for i in self.readers[value]:
                each = self.body[i]
                others = [v for v in reads(each) if v not in made]
                movable = isinstance(each, (Call, Item, Copy)) and i not in self.put
                if movable and all(map(self._taken, others)):
                    moved.update([i, *(self.takes[v] for v in others)])
                    made += [v for v in [target(each)] if isinstance(v, Variable)]
        self.result += [self.body[i] for i in sorted(moved - self.put)]
        self.put |= moved

    def _taken(self, value: Value) -> bool:
        """Whether a value of an earlier graph is taken for one instruction alone."""
        return value in self.takes and len(self.readers[value]) == 1

    def _holds_gradient(self, exchange: Exchange) -> bool:
        """Whether an exchange reduces what has memory of its own, which lives until the wait, to
        what is not read before the end."""
        late = exchange.into is not None or exchange.target in self.kept
        scatters = exchange.wire.kind == "reduce_scatter"
        return (late or scatters) and not isinstance(exchange.source, BucketView)

    def _returned(self, found: Return) -> Return:
        """Leave the wait for what is returned once, as it came, to whoever called."""
        times = Counter(found.results)
        results = [each if times[each] > 1 else self._under_way(each) for each in found.results]
        last = self.result[-1] if self.result else None
        if not self.beside and isinstance(last, Start) and last.exchange.into:
            # Nothing is left that this one could overlap with.
            self._need((last.exchange.into,))
        into = {p: w.exchange for p, w in self.waiting.items() if isinstance(p, BucketView)}
        self._need([place for place, exchange in into.items() if exchange.after])
        reductions = [self.waiting[place] for place in into if place in self.waiting]
        return Return(tuple(results), tuple(UnderWay(w.handle, w.exchange) for w in reductions))

    def _under_way(self, value: Value | UnderWay) -> Value | UnderWay:
        wait = self.waiting.get(value) if isinstance(value, Variable) else None
        if wait is None or wait.exchange.after:
            return value
        del self.waiting[wait.exchange.target]
        return UnderWay(wait.handle, wait.exchange)


def _with_allocations(body: list[Instruction], buckets: Mapping[str, Node]) -> list[Instruction]:
    """The instructions, with memory for each of these buckets before the first that mentions it."""
    left = dict(buckets)
    result: list[Instruction] = []
    for each in body:
        exchange = each.exchange if isinstance(each, (Start, Wait)) else each
        into = exchange.into if isinstance(exchange, Exchange) else None
        mentioned = (*reads(each), target(each), into)
        named = {value.bucket for value in mentioned if isinstance(value, BucketView)}
        result += [Allocate(left.pop(name)) for name in sorted(named & left.keys())]
        result.append(each)
    return result


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

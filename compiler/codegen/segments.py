"""Find what a compiler of kernels can fuse: the computation between two exchanges.

    add_1 = _add(all_reduce, bias)          _given = [all_reduce, bias, x]
    add_2 = _add(x, add_1)             ->   del all_reduce
    del all_reduce, add_1                   add_2, y = _segment0(_given)
    y = _gelu(add_2)

A segment is a run of instructions that make new values of others, and of nothing else. It ends
where something is sent or awaited, and at every call that is better left alone; `fuses` decides
that by what a node is. Gradients of biases and the like, which are written into buckets or added to
totals, come right after it. Those of matrices end it, as what they take or make would be held to
its end: a model without collectives would hold all of them. Freed values are freed inside. A run
with less than two operators that compute anything stays as it is: nothing is there to fuse.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import torch

from meshwright.compiler.codegen.instructions import (
    Allocate,
    BucketView,
    Call,
    Constant,
    Copy,
    Free,
    Instruction,
    Instructions,
    Item,
    Operand,
    Rearrange,
    Segment,
    Take,
    Value,
    Variable,
    reads,
)
from meshwright.compiler.codegen.linking import RankContext
from meshwright.compiler.graph.aliasing import is_view
from meshwright.compiler.graph.ir import MeshOp, Node, Op
from meshwright.compiler.kernels import products
from meshwright.compiler.layout import local_ops
from meshwright.compiler.layout.local_ops import LocalOp, apply_all
from meshwright.compiler.placing.composite import composite_of

aten = torch.ops.aten

PLAIN: set[Op] = {aten.sum.dim_IntList, aten.add.Tensor}
"""Operators whose vectors are computed inside where they go to a bucket, and then copied there."""
Member: TypeAlias = "Call | Item | Rearrange | Free"
Linked: TypeAlias = Callable[[Segment, RankContext], Callable[[list[Any]], Sequence[Any]]]
"""What a segment calls on one rank."""


def segmented(
    instructions: Instructions, fuses: Callable[[Node], bool], linked: Linked
) -> Instructions:
    """The same work, with each run of what `fuses` as one call of what `linked` makes for it."""
    return replace(instructions, body=tuple(_Segments(instructions, fuses, linked).run()))


class _Segments:
    def __init__(
        self, instructions: Instructions, fuses: Callable[[Node], bool], linked: Linked
    ) -> None:
        self.body, self.fuses, self.linked = instructions.body, fuses, linked
        self.members: list[Member] = []
        self.after: list[Instruction] = []
        """What writes into buckets and totals, once the segment has run."""
        self.made: set[Value | None] = set()
        """What the members make."""
        self.kept: set[Value] = set()
        """What is read after the segment."""
        self.number = 0

    def run(self) -> Iterator[Instruction]:
        for each in self.body:
            if isinstance(each, (Take, Allocate)):
                yield each  # it reads nothing that a member could make
            elif not self._join(each):
                yield from self._ended()
                if not self._join(each):
                    yield each
        yield from self._ended()

    def _join(self, each: Instruction) -> bool:
        """Add an instruction to the segment, or to what comes after it; False if it ends it."""
        match each:
            case Free(variables):
                return self._free(variables)
            case Item(source=source) if source in self.made:
                return self._add(each)
            case Rearrange(steps=steps) if all(map(_is_same_view, steps)):
                return self._add(each)
            case Call(target=Variable(), out=None):
                return self._fuses(each) and self._add(each)
            case Call(node=node, out=BucketView() as out) if self._writes_plainly(each):
                value = Variable(f"{node.name}_value")
                self._add(replace(each, target=value, out=None))
                return self._put_after(Copy(value, out, node)) and self._free((value,))
            case Copy(node=node) | Call(target=None, out=None, node=node):
                return bool(self.members) and _is_vector(node) and self._put_after(each)
            case _:
                return False

    def _fuses(self, call: Call) -> bool:
        return _is_view_call(call.node) or self.fuses(call.node)

    def _writes_plainly(self, call: Call) -> bool:
        """Whether a call that writes into a bucket may as well be copied there."""
        computing = any(map(_computes, self.members))
        plain = call.node.op in PLAIN and _is_vector(call.node)
        return computing and plain and self._fuses(call) and not _reads_bucket(call)

    def _add(self, each: Call | Item | Rearrange) -> bool:
        if _reads_bucket(each):
            return False
        self.members.append(each)
        self.made.add(each.target)
        return True

    def _put_after(self, each: Instruction) -> bool:
        self.after.append(each)
        self.kept.update(reads(each))
        return True

    def _free(self, variables: tuple[Variable, ...]) -> bool:
        late = tuple(v for v in variables if v in self.kept)
        early = tuple(v for v in variables if v not in self.kept)
        if late:
            self.after.append(Free(late))
        if early and self.members:
            self.members.append(Free(early))
        return bool(self.members)

    def _ended(self) -> Iterator[Instruction]:
        """What has come together, and from here on nothing."""
        members, after = self.members, self.after
        self.members, self.after, self.made, self.kept = [], [], set(), set()
        # Views before the first have nothing to do with what is computed.
        first = next((i for i, each in enumerate(members) if _computes(each)), len(members))
        yield from members[:first]
        members = members[first:]
        if sum(map(_computes, members)) < 2 or not _is_whole(members):
            yield from members
        else:
            yield self._segment(tuple(members))
        yield from after

    def _segment(self, members: tuple[Member, ...]) -> Segment:
        freed = _freed(members)
        made = [each.target for each in members if not isinstance(each, Free)]
        read = [v for each in members for v in reads(each) if v not in made]
        inputs = tuple(dict.fromkeys(read))
        results = tuple(v for v in made if isinstance(v, Variable) and v not in freed)
        name = f"segment{self.number}_"
        self.number += 1
        gone = tuple(v for v in freed if v not in made)
        found = Segment(name, members, inputs, results, gone, lambda _: None)
        return replace(found, recipe=lambda context: self.linked(found, context))


def _is_vector(node: Node) -> bool:
    """Whether a node is a gradient of little memory, which may wait for the end of a segment."""
    return all(type is None or len(type.shape) < 2 for type, _ in node.results)


def _is_whole(members: Sequence[Member]) -> bool:
    """Whether all that leaves the members is tensors, and not multiple results of one call."""
    calls = [each for each in members if isinstance(each, Call)]
    several = {each.target for each in calls if isinstance(each.node.type, tuple)}
    return several <= _freed(members).keys()


def _reads_bucket(each: Instruction) -> bool:
    return any(isinstance(value, BucketView) for value in reads(each))


def _freed(members: Iterable[Member]) -> dict[Variable, None]:
    """What members let go of, in order."""
    return {v: None for each in members if isinstance(each, Free) for v in each.variables}


def _computes(each: Member) -> bool:
    return isinstance(each, Call) and not _is_view_call(each.node)


def _is_view_call(node: Node) -> bool:
    return not isinstance(node.op, MeshOp) and is_view(node.op)


def _is_same_view(step: LocalOp) -> bool:
    """Whether a step is a view, and the same on every rank."""
    views = (local_ops.Reshape, local_ops.Permute, local_ops.Spread, local_ops.Take)
    return isinstance(step, views)


def segment_key(segment: Segment, context: RankContext) -> tuple[Any, ...]:
    """What equal segments have in common: the same operators on values that stand in the same
    places, whatever they are called and whichever layer or rank it is."""
    places: dict[Value, int] = {value: i for i, value in enumerate(segment.inputs)}

    def placed(operand: Operand) -> Any:
        if isinstance(operand, tuple):
            return tuple(map(placed, operand))
        if isinstance(operand, Constant):
            return repr(operand.recipe(context))
        return ("value", places[operand]) if operand in places else (type(operand), repr(operand))

    found: list[Any] = []
    for each in segment.body:
        match each:
            case Call(function=function, args=args, kwargs=kwargs, node=node):
                what = _function_key(function, node, context)
                named = tuple((key, placed(value)) for key, value in kwargs.items())
                found.append((what, placed(args), named))
            case Item(source=source, index=index):
                found.append((placed(source), index))
            case Rearrange(source=source, steps=steps):
                found.append((placed(source), steps))
        if not isinstance(each, Free) and each.target is not None:
            places[each.target] = len(places)
    return (*found, tuple(places[variable] for variable in segment.results))


def _function_key(function: Constant, node: Node, context: RankContext) -> Any:
    known = composite_of(node.op)
    if known is None:
        return function.recipe(context)
    args = tuple(None if isinstance(arg, Node) else repr(arg) for arg in node.args)
    return node.op, args, tuple(operand.tensor for operand in node.operands())


def _traceable(function: Callable[..., Any]) -> Callable[..., Any]:
    return products.OPERATORS.get(function, function)


class CallError(Exception):
    """A call of a segment failed, that of `node`; what it raised is the cause."""

    def __init__(self, node: Node) -> None:
        super().__init__(node.name)
        self.node = node


def function_of(segment: Segment, context: RankContext) -> Callable[..., list[Any]]:
    """A segment as a function of its inputs, which runs one call after another.

    Raises `CallError` where one of them fails.
    """
    functions = {
        i: _traceable(each.function.recipe(context))
        for i, each in enumerate(segment.body)
        if isinstance(each, Call)
    }

    def run(*inputs: Any) -> list[Any]:
        values: dict[Any, Any] = dict(zip(segment.inputs, inputs, strict=True))

        def given(operand: Operand) -> Any:
            if isinstance(operand, tuple):
                return tuple(map(given, operand))
            if isinstance(operand, Constant):
                return operand.recipe(context)
            return values.get(operand, operand)

        def add(i: int, each: Member) -> None:
            match each:
                case Call(args=args, kwargs=kwargs):
                    named = {key: given(value) for key, value in kwargs.items()}
                    values[each.target] = functions[i](*given(args), **named)
                case Item(source=source, index=index):
                    values[each.target] = values[source][index]
                case Rearrange(source=source, steps=steps):
                    mesh = context.mesh
                    values[each.target] = apply_all(steps, values[source], context.coords, mesh)

        for i, each in enumerate(segment.body):
            try:
                add(i, each)
            except Exception as error:
                assert not isinstance(each, Free)
                raise CallError(each.node) from error
        return [values[variable] for variable in segment.results]

    return run

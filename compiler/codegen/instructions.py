"""The instructions of one rank: what stands between a graph and its source.

A graph becomes one list of them. Overlap orders it, code generation prints it, and the memory of a
step is found by walking it: what is predicted is what runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch

from meshwright.compiler.codegen.linking import RankContext
from meshwright.compiler.graph.ir import Node
from meshwright.compiler.layout.local_ops import LocalOp
from meshwright.compiler.layout.wires import Wire
from meshwright.dsl.errors import plural


@dataclass(frozen=True, slots=True)
class Variable:
    """A value that the function holds until it is freed."""

    name: str


@dataclass(frozen=True, slots=True)
class Constant:
    """Something linked before the function runs; `recipe` makes it for one rank."""

    name: str
    recipe: Callable[[RankContext], Any] = field(compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class BucketView:
    """The memory of a bucket: the whole flat buffer, or the part for the gradient at `index`."""

    bucket: str
    index: int | None = None

    @property
    def name(self) -> str:
        """What generated code calls it."""
        return f"_{self.bucket}_flat" if self.index is None else f"_{self.bucket}_part{self.index}"

    def recipe(self, context: RankContext) -> torch.Tensor:
        """The tensor of one rank."""
        buffer = context.buckets[self.bucket]
        return buffer.flat if self.index is None else buffer.views[self.index]


Value: TypeAlias = "Variable | BucketView"
Operand: TypeAlias = Any  # Value | Constant | number | str | bool | None | tuple of those


@dataclass(frozen=True, slots=True)
class Take:
    """Take a saved value by its number; the store of saved values lets go of it."""

    target: Variable
    number: int
    node: Node


@dataclass(frozen=True, slots=True)
class Item:
    """One of multiple results."""

    target: Variable
    source: Value
    index: int
    node: Node


@dataclass(frozen=True, slots=True)
class Call:
    """Call a function; with `out` it writes its result there, and nothing else holds it."""

    target: Variable | None
    function: Constant
    args: tuple[Operand, ...]
    kwargs: Mapping[str, Operand]
    node: Node
    out: BucketView | None = None


@dataclass(frozen=True, slots=True)
class Segment:
    """Calls that compute `results` of `inputs` alone, as one call of what `recipe` makes for a
    rank: a function of the list of inputs, which it empties. Those that are `freed` are let go of
    before, so that only that list holds them."""

    name: str
    body: tuple[Call | Item | Rearrange | Free, ...]
    inputs: tuple[Value, ...]
    results: tuple[Variable, ...]
    freed: tuple[Variable, ...]
    recipe: Callable[[RankContext], Any] = field(compare=False, repr=False)

    @property
    def node(self) -> Node:
        """The first that is computed."""
        return next(each.node for each in self.body if not isinstance(each, Free))

    @property
    def function(self) -> Constant:
        """What is called."""
        return Constant(f"_{self.name}", self.recipe)


@dataclass(frozen=True, slots=True)
class Copy:
    """Copy a value into a bucket."""

    source: Value
    out: BucketView
    node: Node


@dataclass(frozen=True, slots=True)
class Allocate:
    """Have memory for a bucket, if it has none."""

    node: Node

    @property
    def function(self) -> Constant:
        """What allocates, on one rank."""
        name = self.node.name
        return Constant(f"_allocate_{name}", lambda context: context.buckets[name].allocate)


@dataclass(frozen=True, slots=True)
class Rearrange:
    """Apply steps of one rank, one after another."""

    target: Variable
    source: Value
    steps: tuple[LocalOp, ...]
    node: Node


@dataclass(frozen=True, slots=True)
class Exchange:
    """Run a wire and wait for it: a start and its wait with nothing in between.

    The operand goes through the steps `before`, what arrives through those `after`; with `donate`
    the transport may overwrite what it is given. With `into` the result ends there, and `target` is
    a name for it. It does not start before what it `follows` is computed, which it does not read.
    With `counts`, it exchanges as many rows as these two values say: see `Rows`.
    """

    target: Variable
    wire: Wire
    source: Value
    before: tuple[LocalOp, ...]
    after: tuple[LocalOp, ...]
    donate: bool
    into: BucketView | None
    node: Node
    follows: Value | None = None
    counts: tuple[Value, ...] = ()


@dataclass(frozen=True, slots=True)
class Start:
    """Begin an exchange; the handle keeps its operand until the wait."""

    handle: Variable
    exchange: Exchange

    @property
    def node(self) -> Node:
        """The collective."""
        return self.exchange.node


@dataclass(frozen=True, slots=True)
class Wait:
    """Wait for a handle: from here on the target of the exchange is there."""

    handle: Variable
    exchange: Exchange

    @property
    def node(self) -> Node:
        """The collective."""
        return self.exchange.node


@dataclass(frozen=True, slots=True)
class Move:
    """Begin to bring a value to host memory, to a file or to the device, which no other rank takes
    part in; the handle keeps its operand until it has arrived."""

    handle: Variable
    source: Value
    node: Node


@dataclass(frozen=True, slots=True)
class Arrive:
    """Wait for what is moved: from here on the target is there, and its operand is let go of."""

    target: Variable
    handle: Value
    node: Node


@dataclass(frozen=True, slots=True)
class Pause:
    """Let the rank run other graphs while what has been started is under way."""


@dataclass(frozen=True, slots=True)
class Free:
    """Let go of variables, which frees the memory that nothing else holds."""

    variables: tuple[Variable, ...]


@dataclass(frozen=True, slots=True)
class Save:
    """Save values for the later graphs that take them, each under its number."""

    values: tuple[tuple[int, Value], ...]


@dataclass(frozen=True, slots=True)
class UnderWay:
    """A result that the caller of the function waits for."""

    handle: Variable
    exchange: Exchange


@dataclass(frozen=True, slots=True)
class Return:
    """Return the results of the graph, and what is under way into buckets."""

    results: tuple[Value | UnderWay, ...]
    reductions: tuple[UnderWay, ...] = ()


Instruction: TypeAlias = (
    "Take | Item | Call | Segment | Copy | Allocate | Rearrange | Exchange | Start | Wait | Move"
    " | Arrive | Pause | Free | Save | Return"
)


@dataclass(frozen=True, slots=True)
class Instructions:
    """What each rank does for a graph, in order. Each variable is given a value once; `inputs` are
    those that it begins with, and their nodes. `buckets` are those that have no memory before."""

    name: str
    inputs: Mapping[Variable, Node]
    body: tuple[Instruction, ...]
    buckets: Mapping[str, Node] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"<Instructions of {self.name}: {plural(len(self.body), 'instruction')}>"

    @property
    def exchanges(self) -> tuple[Exchange, ...]:
        """Every exchange, by the numbers of their wires."""
        started = (each.exchange if isinstance(each, Start) else each for each in self.body)
        found = (each for each in started if isinstance(each, Exchange))
        return tuple(sorted(found, key=lambda each: each.wire.index))


def reads(instruction: Instruction) -> Iterator[Value]:
    """The values that an instruction needs, repeats included."""
    match instruction:
        case Call(args=args, kwargs=kwargs):
            yield from _values_in((args, *kwargs.values()))
        case Segment(inputs=inputs):
            yield from inputs
        case Item(source=source) | Copy(source=source) | Rearrange(source=source):
            yield source
        case Move(source=source):
            yield source
        case (
            Exchange(source=source, counts=counts)
            | Start(exchange=Exchange(source=source, counts=counts))
        ):
            yield source
            yield from counts
        case Wait(handle=handle) | Arrive(handle=handle):
            yield handle
        case Save(values=values):
            yield from (value for _, value in values)
        case Return(results, reductions):
            for each in (*results, *reductions):
                yield each.handle if isinstance(each, UnderWay) else each
        case Take() | Free() | Allocate() | Pause():
            pass


def target(instruction: Instruction) -> Value | None:
    """What an instruction gives a value: a variable, or memory of a bucket."""
    match instruction:
        case Call(out=BucketView() as out) | Copy(out=out):
            return out
        case Take(target=found) | Item(target=found) | Call(target=found):
            return found
        case Rearrange(target=found) | Exchange(target=found) | Arrive(target=found):
            return found
        case Wait(exchange=exchange):
            return exchange.target
        case Start(handle=handle) | Move(handle=handle):
            return handle
        case _:
            return None


def _values_in(operand: Operand) -> Iterator[Value]:
    if isinstance(operand, (Variable, BucketView)):
        yield operand
    elif isinstance(operand, tuple):
        for item in operand:
            yield from _values_in(item)

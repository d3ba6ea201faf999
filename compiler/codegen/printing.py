"""Print instructions as Python: a generator that yields where a collective starts or is awaited.

    def run(_inputs, _saved):
        tokens, w, b = _inputs
        y = _linear(x, w)
        y_1 = yield _w0, y
        ...

Straight calls of `torch.*` cost a third of an interpreter's. The source is built from instructions
in memory, never from a file; the one `exec` of the package is here. What depends on the rank
(kernels with their offsets, flat buffers) is linked into a copy of the function for each rank.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

from meshwright.compiler.codegen.instructions import (
    Allocate,
    Arrive,
    BucketView,
    Call,
    Constant,
    Copy,
    Exchange,
    Free,
    Instruction,
    Instructions,
    Item,
    Move,
    Operand,
    Pause,
    Rearrange,
    Return,
    Save,
    Segment,
    Start,
    Take,
    UnderWay,
    Value,
    Variable,
    Wait,
)
from meshwright.compiler.codegen.linking import RankContext
from meshwright.compiler.graph.ir import TO_DEVICE, Node
from meshwright.compiler.layout import wires
from meshwright.compiler.layout.local_ops import LocalOp, Permute, Reshape, bound
from meshwright.compiler.layout.rows import counting
from meshwright.compiler.layout.wires import Wire
from meshwright.dsl.errors import plural

RankFunction: TypeAlias = Callable[
    [Sequence[Any], dict[int, Any]],
    Generator[Any, Any, tuple[tuple[Any, ...], tuple["Pending", ...]]],
]
"""`(inputs, saved)` to a generator that returns the outputs and what is under way into buckets.

It adds to `saved` what it hands over, and takes out what was handed to it, by number."""


@dataclass(frozen=True, slots=True)
class Pending:
    """A collective still under way: waiting for the handle gives the value.

    With `into`, the value belongs there.
    """

    handle: Any
    into: Any = None


@dataclass(frozen=True, slots=True)
class Code:
    """Generated source, recipes for the names it uses, and its wires with their nodes' names."""

    name: str
    source: str
    constants: tuple[Constant | BucketView, ...]
    wires: tuple[Wire, ...]
    wire_names: tuple[str, ...]
    nodes: tuple[Node | None, ...]
    """The node behind each line of the source."""

    def __repr__(self) -> str:
        return f"<Code of {self.name}: {len(self.nodes)} lines, {plural(len(self.wires), 'wire')}>"

    def link(self, context: RankContext) -> RankFunction:
        """The function for one rank."""
        namespace: dict[str, Any] = {each.name: each.recipe(context) for each in self.constants}
        exec(compile(self.source, f"<meshwright {self.name}>", "exec"), namespace)
        function: RankFunction = namespace["run"]
        return function


def printed(instructions: Instructions) -> Code:
    """The code of a list of instructions."""
    printer = _Printer(instructions)
    exchanges = instructions.exchanges
    return Code(
        instructions.name,
        "".join(f"{line}\n" for line in printer.lines),
        tuple(printer.constants.values()),
        tuple(exchange.wire for exchange in exchanges),
        tuple(exchange.node.name for exchange in exchanges),
        tuple(printer.nodes),
    )


_START = Constant("_Start", lambda _: wires.Start)
_WAIT = Constant("_Wait", lambda _: wires.Wait)
_PENDING = Constant("_Pending", lambda _: Pending)


class _Printer:
    def __init__(self, instructions: Instructions) -> None:
        self.lines = ["def run(_inputs, _saved):"]
        self.nodes: list[Node | None] = [None]
        self.constants: dict[str, Constant | BucketView] = {}
        if instructions.inputs:
            names = ", ".join(each.name for each in instructions.inputs)
            self._line(f"{names}, = _inputs")
        for each in instructions.body:
            node = None if isinstance(each, (Pause, Free, Save, Return)) else each.node
            for line in self._instruction(each):
                self._line(line, node)
        if not any(isinstance(each, (Exchange, Start, Wait)) for each in instructions.body):
            # Never reached: it makes a generator of a function that waits for nothing.
            self._line("yield")

    def _line(self, line: str, node: Node | None = None) -> None:
        self.lines.append(f"    {line}")
        self.nodes.append(node)

    def _instruction(self, each: Instruction) -> Sequence[str]:
        match each:
            case Take(target, number):
                return (f"{target.name} = _saved.pop({number})",)
            case Item(target, source, index):
                return (f"{target.name} = {self._text(source)}[{index}]",)
            case Call():
                return (self._call(each),)
            case Segment():
                return self._segment(each)
            case Copy(source, out):
                return (f"{self._text(out)}.copy_({self._text(source)})",)
            case Allocate():
                return (f"{self._text(each.function)}()",)
            case Rearrange(target, source, steps):
                return (f"{target.name} = {self._steps(steps, source)}",)
            case Exchange():
                return self._received(each, f"yield {self._sent(each)}")
            case Start(handle, exchange):
                return (f"{handle.name} = yield {self._text(_START)}({self._sent(exchange)})",)
            case Wait(handle, exchange):
                return self._received(exchange, f"yield {self._text(_WAIT)}({handle.name})")
            case Move(handle, source, node):
                return (f"{handle.name} = {self._moved(source, node)}",)
            case Arrive(target, handle):
                return (f"{target.name} = {self._text(handle)}.wait()",)
            case Pause():
                return ("yield",)
            case Free(variables):
                freed = ", ".join(variable.name for variable in variables)
                return (f"del {freed}",) if freed else ()
            case Save(values):
                saved = ", ".join(f"{key}: {self._text(value)}" for key, value in values)
                return (f"_saved.update({{{saved}}})",)
            case Return(results, reductions):
                returned = f"({self._under_way(results)}), ({self._under_way(reductions)})"
                return (f"return {returned}",)

    def _call(self, call: Call) -> str:
        parts = [self._text(arg) for arg in call.args]
        parts += [f"{key}={self._text(value)}" for key, value in call.kwargs.items()]
        if call.out is not None:
            parts.append(f"out={self._text(call.out)}")
        text = f"{self._text(call.function)}({', '.join(parts)})"
        return text if call.target is None else f"{call.target.name} = {text}"

    def _segment(self, segment: Segment) -> Sequence[str]:
        given = ", ".join(map(self._text, segment.inputs))
        results = "".join(f"{variable.name}, " for variable in segment.results)
        return [
            f"_given = [{given}]",
            *self._instruction(Free(segment.freed)),
            f"{results}= {self._text(segment.function)}(_given)",
        ]

    def _moved(self, source: Value, node: Node) -> str:
        if node.op == TO_DEVICE:
            return f"{self._text(source)}.fetch()"
        if isinstance(source, BucketView):
            name = source.bucket
            leave = Constant(f"_leave_{name}", lambda context: context.buckets[name].leave)
            return f"{self._text(leave)}()"
        path = node.kwargs.get("path")
        name = "_to_host" if path is None else f"_to_disk{len(self.constants)}_"
        store = Constant(name, lambda context: context.stores(path))
        return f"{self._text(store)}({self._text(source)})"

    def _sent(self, exchange: Exchange) -> str:
        wire = exchange.wire
        name = self._text(Constant(f"_w{wire.index}", lambda _: wire))
        given = self._steps(exchange.before, exchange.source)
        if exchange.counts:
            made = self._text(self._rows(exchange))
            given = f"{made}({', '.join([given, *map(self._text, exchange.counts)])})"
        return f"{name}, {given}, {exchange.donate}"

    def _rows(self, exchange: Exchange) -> Constant:
        """What makes the operand of an exchange of as many rows as counts say."""
        index, node = exchange.wire.index, exchange.node
        return Constant(
            f"_rows{index}",
            lambda context: counting(index, node.placed.local_shape(context.mesh)[0], context),
        )

    def _received(self, exchange: Exchange, request: str) -> Sequence[str]:
        name = exchange.target.name
        lines = [f"{name} = {request}"]
        if exchange.after:
            lines.append(f"{name} = {self._steps(exchange.after, exchange.target)}")
        if exchange.into is not None:
            into = self._text(exchange.into)
            lines.append(f"if {name} is not {into}: {into}.copy_({name})")
        return lines

    def _under_way(self, values: Sequence[Value | UnderWay]) -> str:
        return "".join(f"{self._result(value)}, " for value in values)

    def _result(self, value: Value | UnderWay) -> str:
        if not isinstance(value, UnderWay):
            return self._text(value)
        into = value.exchange.into
        given = "" if into is None else f", {self._text(into)}"
        return f"{self._text(_PENDING)}({value.handle.name}{given})"

    def _steps(self, steps: Sequence[LocalOp], source: Value) -> str:
        text = self._text(source)
        for step in steps:
            match step:
                case Reshape(shape):
                    text = f"{text}.reshape({shape})"
                case Permute(order):
                    text = f"{text}.permute({order})"
                case _:
                    function = Constant(f"_step{len(self.constants)}_", partial(_bound, step))
                    text = f"{self._text(function)}({text})"
        return text

    def _text(self, operand: Operand) -> str:
        if isinstance(operand, Variable):
            return operand.name
        if isinstance(operand, (Constant, BucketView)):
            self.constants.setdefault(operand.name, operand)
            return operand.name
        if isinstance(operand, tuple):
            inner = "".join(f"{self._text(item)}, " for item in operand)
            return f"({inner})"
        return repr(operand)


def _bound(step: LocalOp, context: RankContext) -> Callable[[Any], Any]:
    """A step as a function of one rank's tensor."""
    return bound(step, context.coords, context.mesh)

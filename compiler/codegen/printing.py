"""Generate the Python of a graph: a generator that yields where a collective starts or is awaited.

    def forward(_inputs, _saved):
        tokens, w, b = _inputs
        y = _linear(x, w)
        y_1 = yield _w0, y
        ...

Straight calls of `torch.*` cost a third of an interpreter's. The source is built from graphs in
memory, never from a file; the one `exec` of the package is here. What depends on the rank (kernels
with their offsets, flat buffers) is linked into a copy of the function for each rank.
"""

from __future__ import annotations

import keyword
import math
import re
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from meshwright.compiler.codegen.functions import FAST
from meshwright.compiler.codegen.linking import BINDINGS, RandomState, bind
from meshwright.compiler.codegen.local import local_args
from meshwright.compiler.graph.aliasing import IDENTITIES
from meshwright.compiler.graph.ir import GETITEM, INPUT, Arg, Graph, MeshOp, Node, OutputKind
from meshwright.compiler.graph.transfers import TransferKey, transfer_key
from meshwright.compiler.layout.collectives import (
    COLLECTIVES,
    Start,
    Transfer,
    Wait,
    Wire,
    plan_transfer,
)
from meshwright.compiler.layout.local_ops import Permute, Reshape, apply_all
from meshwright.compiler.layout.mesh import Mesh
from meshwright.dsl.errors import plural

aten = torch.ops.aten

RankFunction: TypeAlias = Callable[[Sequence[Any], list[Any]], Generator[Any, Any, Any]]
"""`(inputs, saved)` to a generator that returns `(outputs, saved values)`."""

_OUT = {aten.mm.default, aten.sum.dim_IntList, aten.add.Tensor}
"""Operators that can write straight into a bucket."""

_FRESH = {
    aten.mm.default, aten.matmul.default, aten.linear.default, aten.bmm.default,
    aten.add.Tensor, aten.sum.default, aten.sum.dim_IntList, MeshOp("embedding"),
}  # fmt: skip
"""Operators whose result is memory of its own, which a collective may overwrite."""


@dataclass(frozen=True, slots=True)
class Pending:
    """An output whose collective is still under way: what waiting for the handle gives."""

    handle: Any


@dataclass(frozen=True, slots=True)
class RankContext:
    """What is linked into a rank's copy of the generated functions."""

    mesh: Mesh
    coords: Mapping[str, int]
    device: torch.device
    random: RandomState
    buckets: Mapping[str, tuple[torch.Tensor, ...]]
    """By bucket node: the flat buffer, then its views, one for each gradient."""


@dataclass(frozen=True, slots=True)
class Code:
    """Generated source, recipes for the names it uses, and its wires with their nodes' names."""

    name: str
    source: str
    constants: Mapping[str, Callable[[RankContext], Any]]
    wires: tuple[Wire, ...]
    wire_names: tuple[str, ...]

    def __repr__(self) -> str:
        lines = len(self.source.splitlines())
        return f"<Code of {self.name}: {lines} lines, {plural(len(self.wires), 'wire')}>"

    def link(self, context: RankContext) -> RankFunction:
        """The function for one rank."""
        namespace: dict[str, Any] = {
            name: recipe(context) for name, recipe in self.constants.items()
        }
        exec(compile(self.source, f"<meshwright {self.name}>", "exec"), namespace)
        function: RankFunction = namespace["run"]
        return function


def generate(graph: Graph, *, first_wire: int = 0) -> Code:
    """The code of a graph; its wires are numbered from `first_wire`."""
    return _Generator(graph, first_wire).run()


class _Generator:
    def __init__(self, graph: Graph, first_wire: int) -> None:
        self.graph, self.mesh, self.first_wire = graph, graph.mesh, first_wire
        self.users = graph.users()
        self.lines: list[str] = []
        self.constants: dict[str, Callable[[RankContext], Any]] = {}
        self.names: dict[Node, str] = {}
        self.wires: list[Wire] = []
        self.wire_names: list[str] = []
        self.waiting: dict[str, list[str]] = {}
        """By variable that is still to come: the lines that wait for it."""
        self.returned: Counter[str] = Counter()
        """How often the function returns each variable, as an output or a saved value."""
        self.shared: dict[TransferKey, str] = {}
        self.slots: dict[Node, list[tuple[Node, int]]] = {}
        """The places in buckets that a node's value goes to."""
        for node in graph.nodes:
            if node.op == MeshOp("bucket"):
                for i, part in enumerate(node.args):
                    self.slots.setdefault(part, []).append((node, i))

    def run(self) -> Code:
        inputs = [self._name(node) for node in self.graph.inputs]
        if inputs:
            self.lines.append(f"{', '.join(inputs)}, = _inputs")
        for node in self.graph.nodes:
            if node.op != INPUT:
                self._node(node)
            if node in self.slots and not self._writes_into_bucket(node):
                self._copy_into_buckets(node)
        self._return()
        body = _with_frees(_joined(self.lines), set(inputs))
        source = "def run(_inputs, _saved):\n" + "".join(f"    {line}\n" for line in body)
        if "yield" not in source:
            source += "    yield\n"
        wires = tuple(self.wires)
        return Code(self.graph.name, source, self.constants, wires, tuple(self.wire_names))

    def _name(self, node: Node) -> str:
        name = node.name
        if not name.isidentifier() or keyword.iskeyword(name) or name.startswith("_"):
            name = f"v_{''.join(c if c.isalnum() else '_' for c in name)}"
        self.names[node] = name
        return name

    def _constant(self, stem: str, recipe: Callable[[RankContext], Any]) -> str:
        name = f"_{stem}"
        if stem[-1].isdigit():
            name = f"_{stem}_"
        if name in self.constants:
            name = f"_{stem}_{len(self.constants)}"
        self.constants[name] = recipe
        return name

    def _fixed(self, stem: str, value: Any) -> str:
        """A constant that is the same on every rank, under a name of its own."""
        name = f"_{stem}"
        self.constants.setdefault(name, lambda _: value)
        return name

    def _node(self, node: Node) -> None:
        op = node.op
        if op in IDENTITIES:
            self.names[node] = self.names[node.args[0]]
        elif op == MeshOp("saved"):
            self.lines.append(f"{self._name(node)} = _saved.pop()")
        elif op == GETITEM:
            source = self._value(node.args[0])
            self.lines.append(f"{self._name(node)} = {source}[{node.args[1]}]")
        elif op == MeshOp("bucket"):
            self._bucket(node)
        elif op == MeshOp("bucket_item"):
            self.names[node] = self._bucket_view(node)
        elif isinstance(op, MeshOp) and op.name in COLLECTIVES:
            self._collective(node)
        elif isinstance(op, MeshOp) and op.name in BINDINGS:
            kernel = self._constant(
                f"{op.name}{len(self.constants)}",
                lambda c: bind(node, c.mesh, c.coords, c.random, c.device),
            )
            operands = ", ".join(self._value(n) for n in node.operands())
            self.lines.append(f"{self._name(node)} = {kernel}({operands})")
        else:
            self._torch(node)

    def _torch(self, node: Node) -> None:
        """A call of torch on local sizes, written into a bucket where that is all it is for."""
        assert not isinstance(node.op, MeshOp), node.op
        results = node.layout if isinstance(node.layout, tuple) else (node.placed,)
        operands = [operand.placed for operand in node.operands()]
        args, kwargs = local_args(node.op, node.args, node.kwargs, operands, results, self.mesh)
        if node.op in FAST:
            function = self._fixed(*FAST[node.op])
        else:
            function = self._fixed(str(node.op).replace(".", "_"), node.op)
        parts = [self._text(arg) for arg in args]
        parts += [f"{k}={self._text(v)}" for k, v in kwargs.items() if k not in _HANDLED]
        if any(argument.name == "device" for argument in node.op._schema.arguments) and (
            "device" in kwargs or not any(True for _ in node.operands())
        ):
            self.constants.setdefault("_device", lambda c: c.device)
            parts.append("device=_device")
        if self._writes_into_bucket(node):
            parts.append(f"out={self._view(*self.slots[node][0])}")
        self.lines.append(f"{self._name(node)} = {function}({', '.join(parts)})")

    def _value(self, node: Node) -> str:
        """The variable that holds a node's value; waits for it where it is under way."""
        name = self.names[node]
        self.lines += self.waiting.pop(name, ())
        return name

    def _text(self, arg: Arg) -> str:
        if isinstance(arg, Node):
            return self._value(arg)
        if isinstance(arg, (tuple, list)):
            inner = "".join(f"{self._text(item)}, " for item in arg)
            return f"({inner})"
        if isinstance(arg, (torch.dtype, torch.memory_format, torch.layout)):
            return self._fixed(str(arg).replace(".", "_"), arg)
        if isinstance(arg, torch.device):
            self.constants.setdefault("_device", lambda c: c.device)
            return "_device"
        if isinstance(arg, (bool, int, str)) or arg is None:
            return repr(arg)
        if isinstance(arg, float) and math.isfinite(arg):
            return repr(arg)
        return self._constant(f"constant{len(self.constants)}", lambda _: arg)

    def _view(self, bucket: Node, index: int) -> str:
        name = f"_{bucket.name}_part{index}"
        self.constants[name] = lambda c: c.buckets[bucket.name][index + 1]
        return name

    def _writes_into_bucket(self, node: Node) -> bool:
        """Whether a gradient is computed where it is kept."""
        places = self.slots.get(node, ())
        return node.op in _OUT and len(places) == 1 and len(self.users[node]) == 1

    def _copy_into_buckets(self, node: Node) -> None:
        """Copy a gradient at once, so that its own memory is free again."""
        for bucket, i in self.slots[node]:
            self.lines.append(f"{self._view(bucket, i)}.copy_({self._value(node)})")

    def _bucket(self, node: Node) -> None:
        """A flat buffer that is full by now."""
        flat = f"_{node.name}_flat"
        self.constants[flat] = lambda c: c.buckets[node.name][0]
        self.lines.append(f"{self._name(node)} = {flat}")

    def _bucket_view(self, node: Node) -> str:
        source: Node = node.args[0]
        bucket = source if source.op == MeshOp("bucket") else source.args[0]
        self._value(source)
        return self._view(bucket, node.args[1])

    def _collective(self, node: Node) -> None:
        assert isinstance(node.op, MeshOp)
        options = {key: value for key, value in node.kwargs.items() if key != "axes"}
        source: Node = node.args[0]
        transfer = plan_transfer(
            node.op.name,
            node.kwargs["axes"],
            source.placed,
            node.placed,
            self.mesh,
            **options,
        )
        if transfer.wire is None:
            value = self._steps(transfer.before + transfer.after, self._value(source))
            if value.isidentifier():
                self.names[node] = value
            else:
                self.lines.append(f"{self._name(node)} = {value}")
            return
        key = transfer_key(node)
        if key in self.shared:
            self.names[node] = self.shared[key]
            return
        self._wire(node, transfer, transfer.wire)
        self.shared[key] = self.names[node]

    def _wire(self, node: Node, transfer: Transfer, wire: Wire) -> None:
        """Start a transfer, and leave the waiting for where its result is first needed."""
        source: Node = node.args[0]
        given = self._steps(transfer.before, self._value(source))
        index = self.first_wire + len(self.wires)
        numbered = Wire(wire.kind, wire.axes, wire.reduce, wire.shift, wire.root, index)
        self.wires.append(numbered)
        self.wire_names.append(node.name)
        wire_name = self._fixed(f"w{index}", numbered)
        name, handle = self._name(node), f"{node.name}_handle"
        donate = self._may_overwrite(source) and not transfer.before
        start, wait = self._fixed("Start", Start), self._fixed("Wait", Wait)
        self.lines.append(f"{handle} = yield {start}({wire_name}, {given}, {donate})")
        lines = [f"{name} = yield {wait}({handle})"]
        if source.op == MeshOp("bucket"):
            flat = self.names[source]
            lines.append(f"if {name} is not {flat}: {flat}.copy_({name})")
        if transfer.after:
            lines.append(f"{name} = {self._steps(transfer.after, name)}")
        self.waiting[name] = lines

    def _may_overwrite(self, node: Node) -> bool:
        if len(self.users[node]) > 1 or node in self.graph.returned:
            return False
        return node.op == MeshOp("bucket") or node.op in _FRESH

    def _steps(self, steps: Sequence[Any], value: str) -> str:
        """The expression of local steps: text where it is short, else a bound function."""
        for step in steps:
            if isinstance(step, Reshape):
                value = f"{value}.reshape({step.shape})"
            elif isinstance(step, Permute):
                value = f"{value}.permute({step.order})"
            else:
                bound = self._constant(f"step{len(self.constants)}", _bound_step(step))
                value = f"{bound}({value})"
        return value

    def _return(self) -> None:
        results: list[str] = []
        saved: list[str] = []
        self.returned.update(self.names[output.node] for output in self.graph.outputs)
        for output in self.graph.outputs:
            if output.kind is OutputKind.SAVED:
                saved.append(self._value(output.node))
            else:
                results.append(self._result(output.node))
        inner = "".join(f"{result}, " for result in results)
        self.lines += [line for lines in self.waiting.values() for line in lines]
        self.waiting.clear()
        self.lines.append(f"return ({inner}), [{', '.join(saved)}]")

    def _result(self, node: Node) -> str:
        """An output; one that nothing here has waited for is returned under way."""
        name = self.names[node]
        waits = self.waiting.get(name, ())
        if len(waits) != 1 or self.returned[name] > 1:
            return self._value(node)
        del self.waiting[name]
        return f"{self._fixed('Pending', Pending)}({node.name}_handle)"


_WORD = re.compile(r"[A-Za-z_]\w*")
_HANDLED = {"device", "layout", "pin_memory"}
"""Keywords of factories that code generation writes itself or leaves out."""


def _bound_step(step: Any) -> Callable[[RankContext], Any]:
    def recipe(context: RankContext) -> Any:
        coords, mesh = context.coords, context.mesh
        return lambda tensor: apply_all((step,), tensor, coords, mesh)

    return recipe


_STARTED = re.compile(r"(\w+) = yield _Start\((\w+), (.+), (True|False)\)")


def _joined(lines: list[str]) -> list[str]:
    """The lines, with a start that is waited for at once made one synchronous collective."""
    result: list[str] = []
    for line in lines:
        started = _STARTED.fullmatch(result[-1]) if result else None
        if started and line.endswith(f" = yield _Wait({started[1]})"):
            target = line.partition(" = ")[0]
            result[-1] = f"{target} = yield {started[2]}, {started[3]}, {started[4]}"
        else:
            result.append(line)
    return result


def _with_frees(lines: list[str], kept: set[str]) -> list[str]:
    """The lines, with variables deleted after the last line that reads them."""
    last: dict[str, int] = {}
    written: set[str] = set()
    for i, line in enumerate(lines):
        for name in _identifiers(line):
            last[name] = i
        target, separator, _ = line.partition(" = ")
        if separator and target.isidentifier():
            written.add(target)
    freed: dict[int, list[str]] = {}
    for name in written - kept:
        freed.setdefault(last[name], []).append(name)
    result: list[str] = []
    for i, line in enumerate(lines):
        result.append(line)
        if i in freed and not line.startswith("return"):
            result.append(f"del {', '.join(sorted(freed[i]))}")
    return result


def _identifiers(line: str) -> set[str]:
    return set(_WORD.findall(line))

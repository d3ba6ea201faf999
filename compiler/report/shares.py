"""For which parameters a collective runs: one message may carry what belongs to many."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from meshwright.compiler.graph.aliasing import node_bytes
from meshwright.compiler.graph.ir import (
    GETITEM,
    INPUT,
    MOVES,
    SAVED,
    WAIT,
    Graph,
    InputKind,
    MeshOp,
    Node,
    OutputKind,
    Phase,
)
from meshwright.compiler.graph.transfers import collective_kind, moves
from meshwright.compiler.graph.weights import input_behind
from meshwright.compiler.program import Compiled
from meshwright.compiler.stages import PASSED_AS

aten = torch.ops.aten

Shares = dict[Node, dict[str, float]]
"""By collective: the share of each parameter in what it moves."""


def shares(program: Compiled) -> Shares:
    """The collectives that gather parameters and reduce their gradients, whole buckets too, and
    what carries either between stages: the inputs that take it."""
    found: Shares = {}
    ways = _Ways(program)
    for node, (value, graph) in ways.sent.items():
        if graph in ways.before:
            sources = _parameters_behind(value)
            for name in sources:
                _note(found, node, name, 1 / len(sources))
    for graph in program.graphs().values():
        for node in filter(moves, graph.nodes):
            for operand, share in _operands(node, graph):
                source = input_behind(operand)
                if source is not None and source.of_model:
                    _note(found, node, str(source.args[1]), share)
        _note_gradients(found, graph, ways)
    return found


class _Ways:
    """Where graphs take what others have left: values and their graphs, by the number of a saved
    one, and by the input that takes what another stage has sent."""

    def __init__(self, program: Compiled) -> None:
        graphs = program.graphs().values()
        self.before = [s.graphs[Phase.BEFORE] for s in program.stages if Phase.BEFORE in s.graphs]
        """Those of weights, which are sent before the first forward."""
        self.saved = {o.name: (o.node, g) for g in graphs for o in g.outputs_of(OutputKind.SAVED)}
        values = {
            (PASSED_AS[output.kind], output.name): (output.node, graph)
            for stage in program.stages
            for phase, graph in stage.graphs.items()
            for output in stage.sent(phase)
        }
        taken = (node for s in program.stages for phase in s.graphs for node in s.received(phase))
        self.sent = {node: values[node.args] for node in taken}


def _parameters_behind(value: Node) -> set[str]:
    """The names of the parameters that feed a value."""
    found: set[str] = set()
    pending, seen = [value], {value}
    while pending:
        node = pending.pop()
        if node.op == INPUT and node.args[0] == InputKind.PARAMETER:
            found.add(str(node.args[1]))
        new = set(node.operands()) - seen
        seen |= new
        pending += new
    return found


def _stays(node: Node) -> Node:
    """What is moved from where it stays, or the value itself."""
    while node.op == WAIT or node.op in MOVES:
        node = node.args[0]
    return node


def _note(found: Shares, node: Node, name: str, share: float) -> None:
    own = found.setdefault(node, {})
    own[name] = own.get(name, 0.0) + share


def _operands(node: Node, graph: Graph) -> Iterator[tuple[Node, float]]:
    """What is sent together, each with its share of the bytes."""
    sizes = [node_bytes(operand, graph) for operand in node.args]
    for operand, size in zip(node.args, sizes, strict=True):
        yield operand, size / max(sum(sizes), 1)


def _note_gradients(found: Shares, graph: Graph, ways: _Ways) -> None:
    """Note the collectives between where gradients are computed and where they are kept."""
    for gradient in graph.outputs_of(OutputKind.GRADIENT):
        flat, position = gradient.node.args
        flat = _stays(flat)
        bucket = flat if flat.op == MeshOp("bucket") else flat.args[0]
        part, share = list(_operands(bucket, graph))[position]
        if flat is not bucket:
            _note(found, flat, gradient.name, share)
        _note_behind(found, part, graph, gradient.name, ways)


def _note_behind(found: Shares, node: Node, graph: Graph, name: str, ways: _Ways) -> None:
    """Note the collectives that a gradient comes from, in earlier graphs and other stages too."""
    position = 0
    if node.op == SAVED:
        return _note_behind(found, *ways.saved[str(node.args[0])], name, ways)
    if node in ways.sent:
        _note(found, node, name, 1.0)
        return _note_behind(found, *ways.sent[node], name, ways)
    if node.op == aten.add.Tensor:  # of what two stages have computed
        for operand in node.operands():
            _note_behind(found, operand, graph, name, ways)
        return None
    if node.op == GETITEM:
        node, position = node.args
    if collective_kind(node.op) is not None:
        operand, share = list(_operands(node, graph))[position]
        if moves(node):
            _note(found, node, name, share)
        _note_behind(found, operand, graph, name, ways)
    return None

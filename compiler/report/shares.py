"""For which parameters a collective runs: one message may carry what belongs to many."""

from __future__ import annotations

from collections.abc import Iterator

from meshwright.compiler.graph.aliasing import node_bytes
from meshwright.compiler.graph.ir import GETITEM, SAVED, Graph, MeshOp, Node, OutputKind
from meshwright.compiler.graph.transfers import collective_kind, moves
from meshwright.compiler.graph.weights import input_behind
from meshwright.compiler.program import Compiled
from meshwright.compiler.stages import Stage

Shares = dict[Node, dict[str, float]]
"""By collective: the share of each parameter in what it moves."""


def shares(program: Compiled) -> Shares:
    """The collectives that gather parameters and reduce their gradients, whole buckets too."""
    found: Shares = {}
    for stage in program.stages:
        for graph in stage.graphs.values():
            for node in filter(moves, graph.nodes):
                for operand, share in _operands(node, graph):
                    source = input_behind(operand)
                    if source is not None and source.of_model:
                        _note(found, node, str(source.args[1]), share)
        _note_gradients(found, stage)
    return found


def _note(found: Shares, node: Node, name: str, share: float) -> None:
    own = found.setdefault(node, {})
    own[name] = own.get(name, 0.0) + share


def _operands(node: Node, graph: Graph) -> Iterator[tuple[Node, float]]:
    """What is sent together, each with its share of the bytes."""
    sizes = [node_bytes(operand, graph) for operand in node.args]
    for operand, size in zip(node.args, sizes, strict=True):
        yield operand, size / max(sum(sizes), 1)


def _note_gradients(found: Shares, stage: Stage) -> None:
    """Note the collectives between where gradients are computed and where they are kept."""
    graphs = stage.graphs.values()
    saved = {o.name: (o.node, g) for g in graphs for o in g.outputs_of(OutputKind.SAVED)}
    for graph in graphs:
        for gradient in graph.outputs_of(OutputKind.GRADIENT):
            flat, position = gradient.node.args
            bucket = flat if flat.op == MeshOp("bucket") else flat.args[0]
            part, share = list(_operands(bucket, graph))[position]
            if flat is not bucket:
                _note(found, flat, gradient.name, share)
            _note_behind(found, part, graph, gradient.name, saved)


def _note_behind(
    found: Shares, node: Node, graph: Graph, name: str, saved: dict[str, tuple[Node, Graph]]
) -> None:
    """Note the collectives that a gradient comes from, in earlier graphs of the stage too."""
    while True:
        position = 0
        if node.op == SAVED:
            node, graph = saved[str(node.args[0])]
            continue
        if node.op == GETITEM:
            node, position = node.args
        if collective_kind(node.op) is None:
            return
        operand, share = list(_operands(node, graph))[position]
        if moves(node):
            _note(found, node, name, share)
        node = operand

"""What the values of a stage are for, from what they are computed of and what takes them."""

from __future__ import annotations

import torch

from meshwright.compiler.graph.aliasing import is_view, storage
from meshwright.compiler.graph.ir import (
    GETITEM,
    INPUT,
    MOVES,
    SAVED,
    TO_DEVICE,
    Graph,
    InputKind,
    MeshOp,
    Node,
    OutputKind,
)
from meshwright.compiler.layout.collectives import COLLECTIVES
from meshwright.compiler.report.memory.tensors import Use
from meshwright.compiler.stages import Stage

aten = torch.ops.aten


def uses(stage: Stage) -> dict[Node, Use]:
    """The use of each value of a stage's graphs that is not simply a value."""
    found: dict[Node, Use] = {}
    summed = {number for number, joined in stage.joined.items() if joined.place is not None}
    for graph in stage.graphs.values():
        moved = (node for node in graph.nodes if node.op in MOVES)
        found.update((_on_device(node), Use.ACTIVATIONS) for node in moved)
        saved = (output.node for output in graph.outputs_of(OutputKind.SAVED))
        found.update((storage(node), Use.ACTIVATIONS) for node in saved)
        found.update(dict.fromkeys(_gradients(graph, summed), Use.GRADIENTS))
    return {**found, **dict.fromkeys(copies(stage), Use.COPIES)}


def _on_device(node: Node) -> Node:
    """What has the memory on the device of a value that is moved."""
    return node if node.op == TO_DEVICE else storage(node.args[0])


def copies(stage: Stage) -> dict[Node, frozenset[str]]:
    """The nodes that are computed of parameters alone, with the names of these."""
    found: dict[Node, frozenset[str]] = {}
    saved: dict[int, frozenset[str]] = {}
    for graph in stage.graphs.values():
        for node in graph.nodes:
            operands = list(node.operands())
            if node.op == INPUT and node.args[0] == InputKind.PARAMETER:
                found[node] = frozenset([node.args[1]])
            elif node.op == SAVED and node.args[0] in saved:
                found[node] = saved[node.args[0]]
            elif operands and all(operand in found for operand in operands):
                found[node] = frozenset().union(*(found[operand] for operand in operands))
        for output in graph.outputs_of(OutputKind.SAVED):
            if output.node in found:
                saved[int(output.name)] = found[output.node]
    return found


def _gradients(graph: Graph, summed: set[int]) -> set[Node]:
    """Buckets and what is on its way there, given the numbers of saved values that are summed up in
    buckets."""
    found = {node for node in graph.nodes if node.op == MeshOp("bucket")}
    elsewhere = {
        output.node
        for output in graph.outputs
        if output.kind is not OutputKind.SAVED or int(output.name) not in summed
    }
    found |= graph.returned - elsewhere
    users = graph.users()
    for node in reversed(graph.nodes):
        takers = users[node]
        if node not in elsewhere and takers and all(t in found and _hands_on(t) for t in takers):
            found.add(node)
    return found


def _hands_on(node: Node) -> bool:
    """Whether a node only moves, casts or gathers up what it is given."""
    moves = isinstance(node.op, MeshOp) and (
        node.op.name in COLLECTIVES or node.op.name == "bucket"
    )
    return moves or node.op in (GETITEM, aten._to_copy.default) or is_view(node.op)

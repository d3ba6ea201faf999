"""Loops that are unrolled in a graph: a step for each rank along axes, as in products of blocks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable

from meshwright.compiler.graph.ir import Graph, MeshOp, Node
from meshwright.compiler.graph.transfers import is_collective, moves


def unrolled(graph: Graph) -> dict[Node, tuple[str, ...]]:
    """The nodes that stand for one of as many steps as there are ranks along axes: broadcasts from
    each rank and sums to each, and what computes with a value that was broadcast."""
    roots: dict[Hashable, Counter[int]] = {}
    rooted = {node: _loop(node) for node in graph.nodes if moves(node) and "root" in node.kwargs}
    for node, loop in rooted.items():
        roots.setdefault(loop, Counter())[node.kwargs["root"]] += 1
    found: dict[Node, tuple[str, ...]] = {}
    for node, loop in rooted.items():
        axes: tuple[str, ...] = node.kwargs["axes"]
        counts = roots[loop]
        if len(counts) == graph.mesh.size(axes) and len(set(counts.values())) == 1:
            found[node] = axes
    given = {node: axes for node, axes in found.items() if node.op == MeshOp("broadcast")}
    for node in graph.nodes:
        steps = (given[each] for each in node.operands() if each in given)
        if not is_collective(node) and (axes := next(steps, ())):
            found[node] = axes
    return found


def _loop(node: Node) -> Hashable:
    """What the steps of a loop have in common."""
    origin = node.origin
    return node.op, node.kwargs["axes"], node.type, node.layout, origin.module, origin.region

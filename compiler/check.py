"""Check a graph after a pass: it is well formed, and every placed node obeys its rule."""

from __future__ import annotations

from meshwright.compiler.errors import PassError
from meshwright.compiler.ir import Graph


def check(graph: Graph, after: str) -> None:
    """Raises `PassError` naming the first node that is out of order or ill placed, and the pass."""
    seen = set()
    names: set[str] = set()
    for node in graph.nodes:
        for operand in node.operands():
            if operand not in seen:
                raise PassError(
                    f"after `{after}`, `{node.name}` uses `{operand.name}` before it is computed",
                    help="report this: it is a bug of the pass",
                )
        if node.name in names:
            raise PassError(
                f"after `{after}`, two nodes are called `{node.name}`",
                help="report this: it is a bug of the pass",
            )
        seen.add(node)
        names.add(node.name)

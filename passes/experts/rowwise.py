"""Whether a module treats each token alone, as an expert must, which sees others beside it."""

from __future__ import annotations

from meshwright.compiler.graph.ir import GETITEM, Graph, Node
from meshwright.compiler.graph.slots import call_operands
from meshwright.compiler.layout.mesh import Mesh
from meshwright.passes.statements.sequences.orders import Places, through


def mixing(graph: Graph, module: str, value: Node) -> Node | None:
    """The first node of a module that is not known to treat each token of `value`, which enters
    there, alone; None if there is none."""
    inside = [n for n in graph.nodes if any(path == module for path, _ in n.origin.modules)]
    shape = value.tensor.shape[:-1]
    dims = [dim for dim, size in enumerate(shape) if size > 1]
    found = (_mixing_in(inside, value, dim, shape[dim]) for dim in dims)
    return next((node for node in found if node is not None), None)


def _mixing_in(inside: list[Node], value: Node, dim: int, size: int) -> Node | None:
    # Rules are asked what they allow on some mesh that could split this dim.
    mesh = Mesh((("ep", next(n for n in range(2, size + 1) if size % n == 0)),))
    places: dict[Node, tuple[Places, ...]] = {value: ({dim: 1},)}
    for node in inside:
        given = [places.get(each, ({},))[0] for each in call_operands(node.args, node.kwargs)]
        if node.op == GETITEM and node.args[0] in places:
            places[node] = (places[node.args[0]][node.args[1]],)
        elif any(given):
            found = through(node, given, {}, size, mesh, ordered=False)
            if found is None or not any(found[1]):
                return node
            places[node] = found[1]
    return None

"""Check a graph after a pass: it is well formed, and every placed node obeys its rule.

So a wrong rewrite fails at the pass that made it, with the node's name. Equal calls are checked
once: a hundred equal layers cost one.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from meshwright.compiler.errors import LayoutError, PassError
from meshwright.compiler.graph.ir import SAVED, Graph, Node, NodeLayout
from meshwright.compiler.graph.transfers import collective_kind, transfers_of
from meshwright.compiler.layout.layout import Layout
from meshwright.compiler.layout.mesh import Mesh
from meshwright.compiler.placing.allowed import allowed
from meshwright.compiler.placing.calls import make_call
from meshwright.compiler.placing.frame import FRAME, Saved, saved_by
from meshwright.compiler.placing.rules.factories import makes_zeros
from meshwright.compiler.placing.rules.notation import Call, Operand, Placement


def check_all(graphs: Sequence[Graph], after: str, checked: set[Node]) -> None:
    """Check the graphs of a program, each with what the others save; see `check`."""
    saved = saved_by(graphs)
    for graph in graphs:
        check(graph, after, checked, saved)


def check(
    graph: Graph, after: str, checked: set[Node] | None = None, saved: Saved | None = None
) -> None:
    """Raises `PassError` naming the first node that is out of order or ill placed, and the pass.

    `checked` are nodes found to be well placed after earlier passes, and these are added to it: a
    node that a pass takes over as it is need not be looked at again.
    """
    checked = set() if checked is None else checked
    placed = any(node.layout is not None for node in graph.nodes)
    seen: set[Node] = set()
    names: set[str] = set()
    for node in graph.nodes:
        if not seen.issuperset(node.operands()):
            early = next(operand for operand in node.operands() if operand not in seen)
            raise _broken(node, after, f"uses `{early.name}` before it is computed")
        if node.name in names:
            raise _broken(node, after, "has the name of another node")
        seen.add(node)
        names.add(node.name)
        if placed and node not in checked:
            if node.layout is None:
                raise _broken(node, after, "has no layout, and others have")
            _check_placed(node, graph, after, saved or {})
            checked.add(node)


def _broken(node: Node, after: str, what: str) -> PassError:
    return PassError(
        f"after `{after}`, `{node.name}` {what}",
        culprit=f"{node.origin.module} {node.origin.source}".strip(),
        help="report this: it is a bug of the pass",
    )


def _check_placed(node: Node, graph: Graph, after: str, saved: Saved) -> None:
    """The node's layout is one that its rule gives for the layouts of its operands."""
    _check_sizes(node, after)
    if node.op in FRAME:
        type, layout = FRAME[node.op](node, graph.mesh, saved)
        if node.type != type or not _equal(node.layout, layout, graph.mesh):
            raise _broken(
                node, after, f"is {node.type} laid out as {node.layout}, not {type} as {layout}"
            )
        return
    if collective_kind(node.op) is not None:
        try:
            transfers_of(node, graph.mesh)
        except LayoutError as error:
            raise _broken(node, after, f"is not such a collective: {error.problem}") from error
        return
    layouts = node.layout if isinstance(node.layout, tuple) else (node.layout,)
    call = make_call(
        node.op,
        node.args,
        node.kwargs,
        node.type,
        graph.mesh,
        lambda n: Operand(
            n.tensor,
            n.placed,
            differentiable=n.requires_grad and node.requires_grad,
            zero=_is_zeros(n, saved),
        ),
        tuple(layout for layout in layouts[:1] if layout is not None),
    )
    if not _allowed(call, layouts):
        given = ", ".join(str(operand.layout) for operand in call.operands)
        raise _broken(node, after, f"may not give {layouts} on operands {given}")


def _is_zeros(node: Node, saved: Saved) -> bool:
    """Whether a value is zeros that were made for it, in an earlier graph too."""
    made = saved.get(str(node.args[0]), node) if node.op == SAVED else node
    return makes_zeros(made.op, made.args)


def _check_sizes(node: Node, after: str) -> None:
    for type, layout in node.results:
        if type is not None and layout is not None and type.shape != layout.shape:
            raise _broken(node, after, f"is {list(type.shape)} and laid out as {layout}")


def _equal(ours: NodeLayout, theirs: NodeLayout, mesh: Mesh) -> bool:
    if isinstance(ours, Layout) and isinstance(theirs, Layout):
        return ours.equals(theirs, mesh)
    return ours == theirs


@lru_cache(maxsize=65536)
def _allowed(call: Call, layouts: tuple[Layout | None, ...]) -> bool:
    own = tuple(operand.layout for operand in call.operands)
    return Placement(own, layouts) in allowed(call)

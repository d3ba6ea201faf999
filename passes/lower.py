"""Lower composites whose special dim is split to local steps and the collectives between them.

Before:  linear: f32[8, 96@tp]           = linear(embedding, head_weight)
         cross_entropy: (f32[8], f32[8]) = mesh::cross_entropy(linear, targets, None, -100,
             0.0, 96)
After:   linear: f32[8, 96@tp]                   = linear(embedding, head_weight)
         cross_entropy_stats: f32[2@tp, 2, 8] = mesh::cross_entropy_stats(linear, targets,
             None, -100, 0.0, 96)
         all_gather_replicated: f32[2, 2, 8]     = all_gather_replicated(cross_entropy_stats, tp)
         cross_entropy_combine: (f32[8],
             f32[8]) = mesh::cross_entropy_combine(all_gather_replicated, targets, None, -100,
             0.0, 96)

It runs after differentiation, so that what the steps exchange is never among the saved values.
Requires: a placed graph. Ensures: each composite that is left runs on one rank's part alone.
"""

from __future__ import annotations

from meshwright.compiler.errors import PassError
from meshwright.compiler.graph.custom import REGISTRY
from meshwright.compiler.graph.ir import (
    GETITEM,
    Arg,
    Builder,
    Graph,
    MeshOp,
    Node,
    NodeLayout,
    NodeType,
    Op,
    map_nodes,
    rewrite,
)
from meshwright.compiler.layout.layout import Layout
from meshwright.compiler.layout.mesh import Mesh
from meshwright.compiler.placing.composite import Lowered, composite_of
from meshwright.compiler.placing.emit import Emitter


class Lowering:
    """The tools with which a composite lowers one node; `args` are of the new graph."""

    def __init__(
        self, emitter: Emitter, node: Node, args: tuple[Arg, ...], steps: dict[Arg, Node]
    ) -> None:
        self.emitter, self.node, self.args, self.steps = emitter, node, args, steps

    @property
    def mesh(self) -> Mesh:
        return self.emitter.mesh

    def call(self, op: Op, *args: Arg, type: NodeType = None, **kwargs: Arg) -> Node:
        """Emit a step, placed by its rule."""
        return self.emitter.call(op, args, kwargs, origin=self.node.origin, type=type)

    def shared(self, op: Op, *args: Arg) -> Node:
        """A step that is emitted once."""
        if (op, *args) not in self.steps:
            self.steps[op, *args] = self.call(op, *args)
        return self.steps[op, *args]

    def items(self, source: Node) -> list[Node | None]:
        """The results of a step that has multiple."""
        assert isinstance(source.type, tuple), source.name
        origin = self.node.origin
        return [
            None if type is None else self.emitter.item(source, i, origin)
            for i, type in enumerate(source.type)
        ]

    def reshard(self, value: Node, layout: Layout, *, anew: bool = False) -> Node:
        """`value` in another layout, by as many collectives as that takes; `anew`, also where it is
        there in that layout: a backward that takes it then saves `value` as it was."""
        return self.emitter.reshard(value, layout, self.node.origin, anew=anew)

    def collective(
        self,
        kind: str,
        value: Node,
        layout: Layout,
        axes: tuple[str, ...],
        *,
        type: NodeType = None,
        **options: Arg,
    ) -> Node:
        """Emit one collective of this kind, which leaves `value` in `layout`."""
        return self.emitter.builder.emit(
            MeshOp(kind),
            (value,),
            {"axes": axes, **options},
            type=type or value.type,
            layout=layout,
            origin=self.node.origin,
        )


def lower(graph: Graph) -> Graph:
    """The graph with each split composite lowered."""
    # Nothing is differentiated again.
    emitter = Emitter(Builder(graph.name, graph.mesh), backward=True)

    results: dict[Node, tuple[Node | None, ...]] = {}
    steps: dict[Arg, Node] = {}

    def lowered(builder: Builder, node: Node, mapping: dict[Node, Node]) -> Node | None:
        if node.op == GETITEM and node.args[0] in results:
            return results[node.args[0]][node.args[1]]
        if returned := _returned(node):
            return mapping[returned]
        found = _steps(emitter, node, map_nodes(node.args, mapping.__getitem__), steps)
        if isinstance(found, tuple):
            results[node] = found
            return next(filter(None, found))  # only its items are used
        return found

    return rewrite(graph, lowered, builder=emitter.builder)


def _steps(emitter: Emitter, node: Node, args: tuple[Arg, ...], steps: dict[Arg, Node]) -> Lowered:
    """What replaces a composite whose special dim is split; None for any other node."""
    known = composite_of(node.op)
    if known is None:
        return None
    emitter.builder.phase = node.phase
    found = known.lower(Lowering(emitter, node, args, steps))
    if found is not None and _form(found) != (node.type, node.layout):
        raise PassError(
            f"`{node.op}` is lowered to {_form(found)}",
            culprit=f"{node.name}: {node.type} as {node.layout}",
            help="report this: a lowering keeps types and layouts",
        )
    return found


def _form(found: Node | tuple[Node | None, ...]) -> tuple[NodeType, NodeLayout]:
    """The types and layouts of results."""
    if isinstance(found, Node):
        return found.type, found.layout
    present = [(None, None) if x is None else (x.tensor, x.placed) for x in found]
    return tuple(type for type, _ in present), tuple(layout for _, layout in present)


def _returned(node: Node) -> Node | None:
    """The operand that a custom operator returns as it is: its vjp, all it was for, is applied."""
    source, index = (node.args[0], node.args[1]) if node.op == GETITEM else (node, 0)
    if source.op not in REGISTRY or REGISTRY[source.op].num_returned <= index:
        return None
    returned: Node = source.args[index]
    return returned

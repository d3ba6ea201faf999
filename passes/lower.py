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

from collections.abc import Callable, Mapping

from meshwright.compiler.graph.custom import REGISTRY
from meshwright.compiler.graph.ir import (
    GETITEM,
    Arg,
    Builder,
    Graph,
    MeshOp,
    Node,
    NodeType,
    TensorType,
    map_nodes,
    rewrite,
)
from meshwright.compiler.graph.types import result_type, statistic
from meshwright.compiler.layout.layout import Layout, cut, dim_axes, whole


class Lowering:
    """What one composite is lowered with: its node, with operands in the new graph."""

    def __init__(self, builder: Builder, node: Node, args: tuple[Arg, ...]) -> None:
        self.builder, self.node, self.args = builder, node, args

    def emit(
        self,
        name: str,
        *args: Arg,
        layout: Layout | tuple[Layout | None, ...],
        type: NodeType = None,
        **kwargs: Arg,
    ) -> Node:
        """Emit one step or collective in place of the composite."""
        return self.builder.emit(
            MeshOp(name),
            args,
            kwargs,
            type=type or result_type(MeshOp(name), args, kwargs),
            layout=layout,
            origin=self.node.origin,
            phase=self.node.phase,
        )

    @property
    def layouts(self) -> tuple[Layout | None, ...]:
        assert isinstance(self.node.layout, tuple)
        return self.node.layout


def lower(graph: Graph) -> Graph:
    """The graph with each split composite lowered."""
    return rewrite(graph, _lowered)


def _lowered(builder: Builder, node: Node, mapping: Mapping[Node, Node]) -> Node | None:
    name = node.op.name if isinstance(node.op, MeshOp) else ""
    if name in LOWERINGS and (axes := dim_axes(_special(node).placed.dims[-1])):
        args = map_nodes(node.args, mapping.__getitem__)
        return LOWERINGS[name](Lowering(builder, node, args), axes)
    returned = _returned(node)
    return mapping[returned] if returned else None


def _returned(node: Node) -> Node | None:
    """The operand that a node is, now that its backward has been written out."""
    source, index = (node.args[0], node.args[1]) if node.op == GETITEM else (node, 0)
    if source.op not in REGISTRY or REGISTRY[source.op].num_returned <= index:
        return None
    returned: Node = source.args[index]
    return returned


def _special(node: Node) -> Node:
    """The operand whose last dim a composite reduces over."""
    assert isinstance(node.op, MeshOp)
    found: Node = node.args[_OPERAND[node.op.name]]
    return found


_OPERAND = {"cross_entropy": 0, "norm": 0, "norm_backward": 1}


def _gathered(lowering: Lowering, stats: Node, axes: tuple[str, ...]) -> Node:
    """Statistics `[n, ...]`, one row a rank over `axes`, on every rank."""
    layout = stats.placed.drop_split(axes, lowering.builder.mesh)
    return lowering.emit("all_gather_replicated", stats, layout=layout, type=stats.type, axes=axes)


def _cross_entropy(lowering: Lowering, axes: tuple[str, ...]) -> Node:
    logits, target, weight, ignore_index, smoothing, num_classes = lowering.args
    rows = lowering.layouts[0]
    assert rows is not None
    n, k = lowering.builder.mesh.size(axes), 3 if smoothing else 2
    shape = (n, k, *logits.tensor.shape[:-1])
    stats = lowering.emit(
        "cross_entropy_stats",
        *lowering.args,
        type=TensorType(shape, statistic(logits.tensor.dtype)),
        layout=rows.with_dims((cut(n, *axes), whole(k), *rows.dims)),
    )
    return lowering.emit(
        "cross_entropy_combine",
        *(_gathered(lowering, stats, axes), target, weight, ignore_index, smoothing, num_classes),
        layout=lowering.layouts,
    )


def _norm(lowering: Lowering, axes: tuple[str, ...]) -> Node:
    x, weight, bias, eps, kind = lowering.args
    rows = lowering.layouts[2]
    assert rows is not None
    n, k = lowering.builder.mesh.size(axes), 2 if kind == "layer" else 1
    stats = lowering.emit(
        "norm_stats",
        *(x, kind),
        type=TensorType((n, k, *x.tensor.shape[:-1]), statistic(x.tensor.dtype)),
        layout=rows.with_dims((cut(n, *axes), whole(k), *rows.dims)),
    )
    return lowering.emit(
        "norm_finish",
        *(x, _gathered(lowering, stats, axes), weight, bias, eps, kind),
        type=lowering.node.type,
        layout=lowering.layouts,
    )


def _norm_backward(lowering: Lowering, axes: tuple[str, ...]) -> Node:
    rstd, kind = lowering.args[3], lowering.args[6]
    rows = rstd.placed
    pending = rows.with_dims((whole(2), *rows.dims)).add_partial(axes)
    sums = lowering.emit("norm_backward_sums", *lowering.args[:5], kind, layout=pending)
    total = lowering.emit(
        "all_reduce", sums, layout=pending.drop_partial(axes), type=sums.type, axes=axes
    )
    return lowering.emit("norm_backward_apply", total, *lowering.args, layout=lowering.layouts)


LOWERINGS: dict[str, Callable[[Lowering, tuple[str, ...]], Node]] = {
    "cross_entropy": _cross_entropy,
    "norm": _norm,
    "norm_backward": _norm_backward,
}

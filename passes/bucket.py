"""Reduce gradients in buckets: one flat buffer, and one all-reduce, for many parameters.

Before:  all_reduce_1: f32[16]     = all_reduce(sum_1, dp)
         all_reduce_2: f32[16, 64] = all_reduce(mm, dp)
After:   bucket: f32[1040] partial(dp) = mesh::bucket(mm, sum_1)
         all_reduce_1: f32[1040]       = all_reduce(bucket, dp)
         down_weight_grad: f32[16, 64] = mesh::bucket_item(all_reduce_1, 0)
         down_bias_grad: f32[16]       = mesh::bucket_item(all_reduce_1, 1)

A bucket holds gradients of one stage with equal axes and element type, in the order in which the
backward makes them, so that its reduction starts as soon as the last is there. Gradients that need
no reduction are laid out in flat buffers too: every parameter's gradient is a view of one, for the
whole run. Those that may leave the device do so layer by layer.
Requires: a placed joint graph. Ensures: every `gradient:` output is an item of a bucket.
Elsewhere: DDP's buckets, found there by hooks at run time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import torch

from meshwright.compiler.graph.aliasing import node_bytes
from meshwright.compiler.graph.ir import (
    Builder,
    Graph,
    MeshOp,
    Node,
    Origin,
    Output,
    OutputKind,
    Phase,
    rewrite,
)
from meshwright.compiler.graph.transfers import combines
from meshwright.compiler.placing.frame import BUCKET, BUCKET_ITEM, bucket_type
from meshwright.passes.statements.draft import Draft

BUCKET_BYTES = 25 << 20
"""The size in bytes at which a bucket is closed: large enough that latency does not matter."""


@dataclass
class _Bucket:
    axes: tuple[str, ...]
    dtype: torch.dtype
    gradients: list[tuple[Output, Node]] = field(default_factory=list)
    """A gradient, and the node that computes it before its reduction."""
    num_bytes: int = 0


def bucket(draft: Draft) -> Draft:
    """`draft` with every `gradient:` output taken from a bucket."""
    layers = {name: each.layer for name, each in draft.movable.items()}
    return replace(draft, graph=bucketed(draft.graph, layers))


def bucketed(
    graph: Graph, layers: Mapping[str, str] = MappingProxyType({}), *, limit: int = BUCKET_BYTES
) -> Graph:
    """The graph with buckets; the gradients of a parameter in `layers` share theirs with those of
    its layer alone."""
    buckets = _collect(graph, layers, limit)
    if not buckets:
        return graph
    closing: dict[Node, list[_Bucket]] = {}
    order = {node: i for i, node in enumerate(graph.nodes)}
    for found in buckets:
        last = max((before for _, before in found.gradients), key=order.__getitem__)
        closing.setdefault(last, []).append(found)
    items: dict[Output, Node] = {}

    def placed(builder: Builder, node: Node, mapping: dict[Node, Node]) -> Node:
        mapping[node] = builder.copy(node, mapping)
        for found in closing.get(node, ()):
            items.update(_emit(builder, found, mapping))
        return mapping[node]

    return rewrite(graph, placed, output=lambda output, node: items.get(output, node))


def _collect(graph: Graph, layers: Mapping[str, str], limit: int) -> list[_Bucket]:
    """The buckets, filled in the order of the backward."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    gradients = [
        (each, _pending(each.node, graph)) for each in graph.outputs_of(OutputKind.GRADIENT)
    ]
    gradients.sort(key=lambda item: order[item[1]])
    open_buckets: dict[tuple[int, tuple[str, ...], torch.dtype, str | None], _Bucket] = {}
    buckets: list[_Bucket] = []
    for gradient, before in gradients:
        after = gradient.node
        axes = after.kwargs["axes"] if after is not before else ()
        key = (before.stage, axes, after.tensor.dtype, layers.get(gradient.name))
        found = open_buckets.get(key)
        if found is None or found.num_bytes >= limit:
            found = open_buckets[key] = _Bucket(axes, after.tensor.dtype)
            buckets.append(found)
        found.gradients.append((gradient, before))
        found.num_bytes += node_bytes(before, graph)
    return buckets


def _pending(gradient: Node, graph: Graph) -> Node:
    """The gradient before its all-reduce over ranks, or itself if it has none."""
    reduced = gradient.op == MeshOp("all_reduce") and not combines(gradient, graph.mesh)
    operand: Node = gradient.args[0] if reduced else gradient
    return operand if operand.op != BUCKET else gradient


def _emit(builder: Builder, found: _Bucket, mapping: dict[Node, Node]) -> dict[Output, Node]:
    builder.phase = Phase.WEIGHT
    parts = tuple(mapping[before] for _, before in found.gradients)
    last = parts[-1].origin
    origin = Origin(module="gradients", forward=last.forward, stage=last.stage)
    type, flat = bucket_type(parts, found.dtype, builder.mesh)
    value = builder.emit(BUCKET, parts, type=type, layout=flat, origin=origin)
    if found.axes:
        value = builder.emit(
            MeshOp("all_reduce"),
            (value,),
            {"axes": found.axes},
            type=value.type,
            layout=flat.drop_partial(),
            origin=origin,
        )
    return {
        gradient: builder.emit(
            BUCKET_ITEM,
            (value, i),
            type=gradient.node.type,
            layout=gradient.node.layout,
            origin=gradient.node.origin,
            name=gradient.name.replace(".", "_") + "_grad",
        )
        for i, (gradient, _) in enumerate(found.gradients)
    }

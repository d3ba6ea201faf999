"""Keep what checkpointed regions save split over an axis along which all ranks have the same.

Before:  add_2_1: f32[8, 8, 24]       = add(add_1_1, dropout_1)
         add_2_1: f32[8, 8, 24]       = saved(11)
         add_3_1_again: f32[8, 8, 24] = add(add_2_1, dropout_2_again)
After:   add_2_1: f32[8, 8, 24]         = add(add_1_1, dropout_1)
         slice_2: f32[8@tp, 8, 24]      = slice(add_2_1, tp)
         add_2_1_part: f32[8@tp, 8, 24] = clone(slice_2)
         add_2_1_part: f32[8@tp, 8, 24] = saved(11)
         add_2_1: f32[8, 8, 24]         = all_gather_replicated(add_2_1_part, tp,
             after=dropout_2_again)
         add_3_1_again: f32[8, 8, 24]   = add(add_2_1, dropout_2_again)

That is `checkpoint ... split=tp`. A rank keeps its part, and the backward gathers the whole right
before it is first taken. Values of which no dim divides stay whole, and so do parameters.
Requires: a graph for each phase of each stage. Ensures: values of the same bits.
Elsewhere: Megatron-LM's `--distribute-checkpointed-activations`; ZeRO-R's partitioned activations.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from meshwright.compiler.graph.aliasing import has_no_memory, memory_of
from meshwright.compiler.graph.ir import (
    SAVED,
    Builder,
    Graph,
    MeshOp,
    Node,
    OutputKind,
    Phase,
    TensorType,
)
from meshwright.compiler.graph.transfers import is_collective
from meshwright.compiler.layout.layout import Layout
from meshwright.compiler.layout.mesh import Mesh
from meshwright.compiler.stages import Stage
from meshwright.passes.statements.blocks.stored import split_further
from meshwright.passes.statements.checkpoint import Regions
from meshwright.passes.statements.draft import Draft

aten = torch.ops.aten


def split_saved(draft: Draft) -> Draft:
    """`draft` with what its regions save split, where their statements say so."""
    if all(each.statement.split is None for each in draft.checkpoints.values()):
        return draft
    stages = tuple(_in_parts(draft, stage) for stage in draft.stages)
    return replace(draft, stages=stages)


@dataclass(frozen=True, slots=True)
class _Split:
    """How a value is saved: the `layout` of the parts over an `axis`, and the line that says so."""

    layout: Layout
    axis: str
    plan_line: str


def _in_parts(draft: Draft, stage: Stage) -> Stage:
    found = dict(_found(draft, stage.forward))
    by_number = {
        output.name: found[output.node]
        for output in stage.forward.outputs_of(OutputKind.SAVED)
        if output.node in found
    }
    graphs = {phase: _gathering(graph, by_number) for phase, graph in stage.graphs.items()}
    return replace(stage, graphs={**graphs, Phase.FORWARD: _cutting(stage.forward, found)})


def _found(draft: Draft, forward: Graph) -> Iterator[tuple[Node, _Split]]:
    """What is saved of a region that saves parts, or enters it, with how it is split."""
    regions, users = Regions(draft.checkpoints, forward), forward.users()
    results = {memory_of(output.node) for output in forward.results}
    for node in dict.fromkeys(each.node for each in forward.outputs_of(OutputKind.SAVED)):
        around = [regions.around.get(each, ()) for each in (node, *users[node])]
        said = (region.statement for levels in around for region in reversed(levels))
        found = ((each.split, each.plan_line) for each in said if each.split is not None)
        axis, plan_line = next(found, (None, ""))
        own = memory_of(node)
        if axis is None or own.held or own in results:
            continue
        layout = _parts(node, axis, draft.mesh)
        if layout is not None:
            yield node, _Split(layout, axis, plan_line)


def _parts(node: Node, axis: str, mesh: Mesh) -> Layout | None:
    """The layout of a value in parts over an axis, along which ranks have the same now."""
    if not isinstance(node.type, TensorType) or mesh.size(axis) == 1:
        return None
    if node.placed.state(axis) != "replicated" or not node.type.shape:
        return None
    layout = split_further(node.placed, (axis,), mesh).canonical(mesh)
    return layout if layout.shape == node.placed.shape else None


def _cutting(forward: Graph, found: Mapping[Node, _Split]) -> Graph:
    """The forward, which saves parts: copies, since a part is in the memory of the whole."""
    builder = Builder(forward.name, forward.mesh)
    mapping: dict[Node, Node] = {}
    parts: dict[Node, Node] = {}
    for node in forward.nodes:
        mapping[node] = builder.copy(node, mapping)
        if (how := found.get(node)) is not None:
            part = _moved(builder, "slice", mapping[node], how, how.layout)
            parts[node] = builder.emit(
                aten.clone.default,
                (part,),
                type=part.type,
                layout=part.layout,
                origin=part.origin,
                name=f"{node.name}_part",
            )
    saved = {**mapping, **parts}
    return builder.graph(
        output.of((saved if output.kind is OutputKind.SAVED else mapping)[output.node])
        for output in forward.outputs
    )


def _gathering(graph: Graph, by_number: Mapping[str, _Split]) -> Graph:
    """A later graph, which gathers the parts that it takes right before their first use."""
    taken = {
        node: by_number[str(node.args[0])]
        for node in graph.nodes
        if node.op == SAVED and str(node.args[0]) in by_number
    }
    if not taken:
        return graph
    builder = Builder(graph.name, graph.mesh)
    mapping: dict[Node, Node] = {}
    before: Node | None = None
    for node in graph.nodes:
        if node in taken:
            continue
        for value in dict.fromkeys(node.operands()):
            if value not in mapping:
                mapping[value] = _gathered(builder, value, taken[value], before)
        made = mapping[node] = builder.copy(node, mapping)
        if not (made.held or made.op == SAVED or is_collective(made) or has_no_memory(made.op)):
            before = made if isinstance(made.type, TensorType) else before
    return builder.graph(output.of(mapping[output.node]) for output in graph.outputs)


def _gathered(builder: Builder, value: Node, how: _Split, before: Node | None) -> Node:
    """The whole of a value that is saved in parts, gathered once another node is computed: it
    would begin with the graph otherwise, and be held until then."""
    part = builder.emit(
        SAVED,
        value.args,
        type=value.type,
        layout=how.layout,
        origin=value.origin,
        name=f"{value.name}_part",
        phase=value.phase,
    )
    return _moved(builder, "all_gather_replicated", part, how, value.placed, value.name, before)


def _moved(
    builder: Builder,
    kind: str,
    value: Node,
    how: _Split,
    layout: Layout,
    name: str = "",
    after: Node | None = None,
) -> Node:
    return builder.emit(
        MeshOp(kind),
        (value,),
        {"axes": (how.axis,)} | ({} if after is None else {"after": after}),
        type=value.type,
        layout=layout,
        origin=replace(value.origin, plan_line=how.plan_line),
        name=name,
        phase=value.phase,
    )

"""Separate the joint graph of a stage into one graph per phase, such as its forward and backward.

Before:  linear: f32[8, 64@tp]             = linear(x, up_weight, up_bias)
         relu: f32[8, 64@tp]               = relu(linear)
         threshold_backward: f32[8, 64@tp] = threshold_backward(matmul, relu, 0)
After:   linear: f32[8, 64@tp]             = linear(x, up_weight, up_bias)
         relu: f32[8, 64@tp]               = relu(linear)
         relu: f32[8, 64@tp]               = saved(0)
         threshold_backward: f32[8, 64@tp] = threshold_backward(matmul, relu, 0)

What a graph takes of an earlier one is saved or computed again (`needs.py` finds out which). A
value that two graphs take is saved for each, under two numbers, so that it is freed after the last.
Each graph returns last what the next takes first. What is computed again is so right before it is
first taken. A stage takes the inputs that it uses, and each of its graphs but the forward those
that this graph does.
Requires: no node takes a value of a later phase. Ensures: each saved value is taken once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch

from meshwright.compiler.graph.aliasing import storage
from meshwright.compiler.graph.ir import (
    GETITEM,
    INPUT,
    SAVED,
    TRANSFER,
    Builder,
    Graph,
    InputKind,
    Node,
    Output,
    OutputKind,
    Phase,
)
from meshwright.compiler.graph.weights import input_behind
from meshwright.compiler.placing.composite import composite_of
from meshwright.compiler.stages import Stage
from meshwright.passes.needs import Needs, Value, recasts
from meshwright.passes.statements.checkpoint import Around, Regions
from meshwright.passes.statements.draft import Call, Checkpointed, Draft
from meshwright.passes.statements.sequences.split import gathers_again

aten = torch.ops.aten


def separate(draft: Draft) -> Draft:
    """`draft` with the graphs of its stage; without gradients there is a forward alone."""
    found: list[Stage] = []
    num_saved = 0
    weights = weights_behind(draft.graph)
    for number, graph in enumerate(stage_graphs(draft)):
        needs = needs_of(draft, graph, draft.checkpoints, weights)
        graphs = separate_graph(graph, f"stage{number}", needs, num_saved=num_saved)
        num_saved += sum(len(each.outputs_of(OutputKind.SAVED)) for each in graphs.values())
        if draft.num_stages > 1:
            graphs = {
                phase: graph if phase is Phase.FORWARD else _without_unused(graph)
                for phase, graph in graphs.items()
            }
        found.append(Stage(number, graphs))
    return replace(draft, stages=tuple(found))


def stage_graphs(draft: Draft) -> list[Graph]:
    """The joint graph of each stage."""
    if draft.num_stages == 1:
        return [draft.graph]
    return [_stage_graph(draft.graph, number) for number in range(draft.num_stages)]


def needs_of(
    draft: Draft,
    graph: Graph,
    checkpoints: Mapping[Call, Checkpointed],
    weights: Mapping[str, Node] | None = None,
) -> Needs:
    """What the graphs of a stage take of earlier ones, under these regions; `weights` are those
    behind transfers, which are found if they are not given."""
    weights = weights_behind(draft.graph) if weights is None else weights
    regathers = partial(_regathers, draft, weights)
    return Needs(graph, _phases(draft, graph), regathers, Regions(checkpoints, graph))


def _phases(draft: Draft, graph: Graph) -> list[Phase]:
    """The phases that have graphs of their own: without a pipeline nothing waits for the cotangents
    of activations alone, and weight gradients are computed with them."""
    own = {node.phase for node in graph.nodes if not node.held}
    there = {Phase.FORWARD: True}
    if draft.num_stages == 1:
        there[Phase.BACKWARD] = bool(graph.outputs_of(OutputKind.GRADIENT))
        there[Phase.WEIGHT] = False
    return [phase for phase in Phase if there.get(phase, phase in own)]


def _stage_graph(graph: Graph, stage: int) -> Graph:
    """The joint graph of one stage: what other stages send is an input, and what they take an
    output, both under the name of the transfer."""
    builder = Builder(graph.name, graph.mesh)
    mapping: dict[Node, Node] = {}
    outputs: list[Output] = []
    used = _inputs_of(graph, stage)
    for node in graph.nodes:
        if node.held and node not in used:
            continue
        sent = node.op == TRANSFER and node.args[0].stage == stage
        if sent:
            outputs.append(Output(OutputKind.SENT, node.name, _sent(builder, node, mapping)))
        if node.op == TRANSFER and node.stage == stage:
            mapping[node] = builder.emit(
                INPUT,
                (InputKind.RECEIVED, node.name),
                type=node.type,
                layout=node.layout,
                origin=node.origin,
                requires_grad=node.requires_grad,
                name=node.name,
                phase=node.phase,
            )
        elif node.held or (node.stage == stage and node.op != TRANSFER):
            mapping[node] = builder.copy(node, mapping)
    outputs += [each.of(mapping[each.node]) for each in graph.outputs if each.node in mapping]
    return builder.graph(outputs)


def _inputs_of(graph: Graph, stage: int) -> set[Node]:
    """What a stage uses of the inputs that ranks hold. An argument that none uses is an input of
    the first, so that programs know all that they are given."""
    used, elsewhere = set(graph.returned), set(graph.returned)
    for node in graph.nodes:
        taker = (node.args[0] if node.op == TRANSFER else node).stage
        (used if taker == stage else elsewhere).update(node.operands())
    if stage == 0:
        used.update(n for n in graph.inputs if not n.of_model and n not in elsewhere)
    return used


def _sent(builder: Builder, transfer: Node, mapping: Mapping[Node, Node]) -> Node:
    """What a stage gives to a transfer: a value of its phase, though it was made once before or,
    being an input, has none."""
    value: Node = mapping[transfer.args[0]]
    if not value.held and (transfer.phase.once or not value.phase.once):
        return value
    return builder.emit(
        aten.alias.default,
        (value,),
        type=value.type,
        layout=value.layout,
        origin=value.origin,
        phase=transfer.phase,
    )


def weights_behind(graph: Graph) -> dict[str, Node]:
    """By name of a transfer: the input that it sends to another stage, as it is or in part."""
    found = {node.name: input_behind(node) for node in graph.nodes if node.op == TRANSFER}
    return {name: source for name, source in found.items() if source is not None}


def _regathers(draft: Draft, sent: Mapping[str, Node], node: Node) -> bool:
    """Whether a later graph gathers or casts a value again, from what is kept of it: under `zero 1`
    and `zero 2` ranks keep the whole weights, and without `zero` those that are only cast, unless
    they are to be elsewhere. `sent` has the weights of other stages."""
    source = input_behind(node)
    if source is not None and source.args[0] == InputKind.RECEIVED:
        source = sent.get(source.args[1])
    if source is not None and source.of_model:
        if recasts(node) and source.args[1] in draft.movable:
            return True
        return draft.zero.get(str(source.args[1]), 0 if recasts(node) else 3) == 3
    return gathers_again(draft.regions, node)


def separate_graph(
    graph: Graph, name: str, needs: Needs, *, num_saved: int = 0
) -> dict[Phase, Graph]:
    """The graphs of a stage called `name` by phase, in their order, one for each of those that
    `needs` knows. Saved values are numbered from `num_saved`."""
    return _Separator(graph, name, needs, num_saved).run()


class _Part:
    """One of the graphs under construction."""

    def __init__(self, builder: Builder, phase: Phase) -> None:
        builder.phase = phase
        self.builder, self.phase = builder, phase
        self.mapping: dict[Value, Node] = {}
        self.saved: dict[Value, int] = {}
        """Values of earlier parts that are saved for this one, with their numbers."""
        self.outputs: list[tuple[Output, Value]] = []


class _Separator:
    def __init__(self, graph: Graph, name: str, needs: Needs, num_saved: int) -> None:
        self.graph, self.needs = graph, needs
        self.nodes = _with_items(graph)
        builders = {phase: Builder(f"{name}.{phase.value}", graph.mesh) for phase in needs.phases}
        self.parts = {phase: _Part(builder, phase) for phase, builder in builders.items()}
        self.order = {node: place for place, node in enumerate(self.nodes)}
        for part in self.parts.values():
            for value in needs.saved[part.phase]:
                part.saved[value] = num_saved
                num_saved += 1

    def run(self) -> dict[Phase, Graph]:
        for output in self.graph.outputs:
            self.parts[self.needs.home[output.node]].outputs.append((output, (output.node, ())))
        for part in reversed(self.parts.values()):
            for value, number in reversed(part.saved.items()):
                saved = Output(OutputKind.SAVED, str(number), value[0])
                self.parts[self.needs.saved[part.phase][value]].outputs.append((saved, value))
        kept = Counter(storage(node) for part in self.parts.values() for node, _ in part.saved)
        kept.update({storage(node) for node in self.graph.returned})
        return {phase: self._emitted(part, kept) for phase, part in self.parts.items()}

    def _emitted(self, part: _Part, kept: Mapping[Node, int]) -> Graph:
        """The graph of a part; `kept` counts how often each storage is saved or returned."""
        for node in self.nodes:
            if node.held:
                part.mapping[node, ()] = part.builder.copy(node, {}, phase=part.phase)
        for node in self.nodes:
            if self.needs.home[node] is part.phase and not node.held:
                self._bring(part, node)
                over = self._overwrites(part, node, kept)
                kwargs = {**node.kwargs, "overwrite": True} if over else None
                part.mapping[node, ()] = part.builder.copy(
                    node,
                    lambda each: part.mapping[self.needs.value(part.phase, each)],
                    kwargs=kwargs,
                )
        return part.builder.graph(output.of(part.mapping[value]) for output, value in part.outputs)

    def _bring(self, part: _Part, reader: Node) -> None:
        """Make available what a node takes of earlier parts: what is computed again is so in the
        order of the forward."""
        again: set[Value] = set()
        pending = list(self.needs.operands(part.phase, reader))
        while pending:
            value = pending.pop()
            if value in self.needs.again[part.phase] and not (
                value in part.mapping or value in again
            ):
                again.add(value)
                pending += self.needs.operands(part.phase, *value)
        for node, around in sorted(again, key=self._place):
            self._take(part, node, around)
            self._repeat(part, node, around)
        self._take(part, reader)

    def _place(self, value: Value) -> tuple[int, int]:
        return self.order[value[0]], len(value[1])

    def _take(self, part: _Part, node: Node, around: Around | None = None) -> None:
        """Take what is saved of the operands of a node."""
        for value in self.needs.operands(part.phase, node, around):
            if value in part.saved and value not in part.mapping:
                saved = value[0]
                part.mapping[value] = part.builder.emit(
                    SAVED,
                    (part.saved[value],),
                    type=saved.type,
                    layout=saved.layout,
                    origin=saved.origin,
                    name=saved.name,
                )

    def _repeat(self, part: _Part, node: Node, around: Around) -> None:
        """Compute a value again; in a region, so that it can be told from the forward's."""
        part.mapping[node, around] = part.builder.copy(
            node,
            lambda each: part.mapping[self.needs.value(part.phase, each, around)],
            phase=part.phase,
            origin=replace(node.origin, region=around[-1].name) if around else None,
            name=f"{node.name}_again" if around else "",
        )

    def _overwrites(self, part: _Part, node: Node, kept: Mapping[Node, int]) -> bool:
        """Whether a composite may write its result over an operand: nothing else will read it."""
        known = composite_of(node.op)
        if known is None or known.overwrites is None:
            return False
        operand = node.args[known.overwrites]
        memory, value = storage(operand), self.needs.value(part.phase, operand)
        alone = self.needs.readers[part.phase][value] == 1 and kept[memory] == 1
        forward = self.needs.home[operand] is Phase.FORWARD
        return value in part.saved and alone and forward and not memory.held


def _with_items(graph: Graph) -> list[Node]:
    """The nodes in order, items right behind what has them: the memory of multiple results is one
    until the last of them is taken, and the backward has asked for some only at its own place."""
    items: dict[Node, list[Node]] = {}
    for node in graph.nodes:
        if node.op == GETITEM:
            items.setdefault(node.args[0], []).append(node)
    own = (node for node in graph.nodes if node.op != GETITEM)
    return [each for node in own for each in (node, *items.get(node, ()))]


def _without_unused(graph: Graph) -> Graph:
    """The graph without inputs that it does not use."""
    used = graph.returned.union(*(node.operands() for node in graph.nodes))
    return replace(graph, nodes=tuple(n for n in graph.nodes if not n.held or n in used))

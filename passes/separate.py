"""Separate the joint graph of a stage into one graph per phase, such as its forward and backward.

Before:  linear: f32[8, 64@tp]             = linear(x, up_weight, up_bias)
         relu: f32[8, 64@tp]               = relu(linear)
         threshold_backward: f32[8, 64@tp] = threshold_backward(matmul, relu, 0)
After:   linear: f32[8, 64@tp]             = linear(x, up_weight, up_bias)
         relu: f32[8, 64@tp]               = relu(linear)
         relu: f32[8, 64@tp]               = saved(0)
         threshold_backward: f32[8, 64@tp] = threshold_backward(matmul, relu, 0)

What a graph takes from an earlier one is saved, except views of parameters, which are taken again,
and gathers of stored-split parameters and sequence-split activations, which are repeated from the
shard. A value that two graphs take is saved for each, under two numbers, so that it is freed after
the last. Each graph returns last what the next takes first. A stage takes the inputs that it uses,
and each of its graphs but the forward those that this graph does.
Requires: no node takes a value of a later phase. Ensures: each saved value is taken once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch

from meshwright.compiler.graph.aliasing import storage
from meshwright.compiler.graph.ir import (
    INPUT,
    SAVED,
    TRANSFER,
    Builder,
    Graph,
    InputKind,
    MeshOp,
    Node,
    Output,
    OutputKind,
    Phase,
)
from meshwright.compiler.graph.transfers import collective_kind
from meshwright.compiler.graph.weights import input_behind
from meshwright.compiler.placing.composite import composite_of
from meshwright.compiler.stages import Stage
from meshwright.passes.statements.draft import Draft
from meshwright.passes.statements.sequence import gathers_again

aten = torch.ops.aten

_VIEWS = {
    aten.view.default,
    aten.t.default,
    aten.transpose.int,
    aten.permute.default,
    aten.unsqueeze.default,
    aten.slice.Tensor,
    MeshOp("vary"),
}


def separate(draft: Draft) -> Draft:
    """`draft` with the graphs of its stage; without gradients there is a forward alone."""
    found: list[Stage] = []
    num_saved = 0
    weights = _weights_behind(draft.graph)
    for number in range(draft.num_stages):
        graph = _stage_graph(draft.graph, number) if draft.num_stages > 1 else draft.graph
        phases, name = _phases(draft, graph), f"stage{number}"
        regather = partial(_regathers, draft, weights)
        graphs = separate_graph(graph, name, phases, regather=regather, num_saved=num_saved)
        num_saved += sum(len(each.outputs_of(OutputKind.SAVED)) for each in graphs.values())
        if draft.num_stages > 1:
            graphs = {
                phase: graph if phase is Phase.FORWARD else _without_unused(graph)
                for phase, graph in graphs.items()
            }
        found.append(Stage(number, graphs))
    return replace(draft, stages=tuple(found))


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


def _weights_behind(graph: Graph) -> dict[str, Node]:
    """By name of a transfer: the input that it sends to another stage, as it is or in part."""
    found = {node.name: input_behind(node) for node in graph.nodes if node.op == TRANSFER}
    return {name: source for name, source in found.items() if source is not None}


def _regathers(draft: Draft, sent: Mapping[str, Node], node: Node) -> bool:
    """Whether a later graph gathers or casts a value again, from what is kept of it: under `zero 1`
    and `zero 2` ranks keep the whole weights, and without `zero` those that are only cast. `sent`
    has the weights of other stages."""
    source = input_behind(node)
    if source is not None and source.args[0] == InputKind.RECEIVED:
        source = sent.get(source.args[1])
    if source is not None and source.of_model:
        return draft.zero.get(str(source.args[1]), 0 if _recasts(node) else 3) == 3
    return gathers_again(draft.regions, node)


def separate_graph(
    graph: Graph,
    name: str,
    phases: Sequence[Phase],
    *,
    regather: Callable[[Node], bool],
    num_saved: int = 0,
) -> dict[Phase, Graph]:
    """The graphs of a stage called `name` by phase, one for each of `phases`, in their order.

    Nodes of a phase without a graph run in that of the phase before. `regather` says of a gathered
    value whether it is gathered again rather than kept. Saved values are numbered from `num_saved`.
    """
    return _Separator(graph, name, phases, regather, num_saved).run()


class _Part:
    """One of the graphs under construction."""

    def __init__(self, builder: Builder, phase: Phase) -> None:
        builder.phase = phase
        self.builder, self.phase = builder, phase
        self.mapping: dict[Node, Node] = {}
        self.again: set[Node] = set()
        """Values of earlier parts that this one computes again."""
        self.saved: dict[Node, int] = {}
        """Values of earlier parts that are saved for this one, with their numbers."""
        self.readers: Counter[Node] = Counter()
        self.outputs: list[Output] = []


class _Separator:
    def __init__(
        self,
        graph: Graph,
        name: str,
        phases: Sequence[Phase],
        regather: Callable[[Node], bool],
        num_saved: int,
    ) -> None:
        self.graph, self.regather = graph, regather
        builders = {phase: Builder(f"{name}.{phase.value}", graph.mesh) for phase in phases}
        self.parts = [_Part(builder, phase) for phase, builder in builders.items()]
        order = list(Phase)
        runs_in = {
            phase: ([p for p in self.parts if order.index(p.phase) <= place] or self.parts)[-1]
            for place, phase in enumerate(order)
        }
        self.home = {node: runs_in[node.phase] for node in graph.nodes}
        self.num_saved = num_saved
        self._cheap: dict[Node, bool] = {}

    def run(self) -> dict[Phase, Graph]:
        for node in self.graph.nodes:
            self._need_operands(self.home[node], node)
        for output in self.graph.outputs:
            self.home[output.node].outputs.append(output)
        for part in reversed(self.parts):
            for node, number in reversed(part.saved.items()):
                saved = Output(OutputKind.SAVED, str(number), node)
                self.home[node].outputs.append(saved)
        kept = Counter(storage(node) for part in self.parts for node in part.saved)
        kept.update({storage(node) for node in self.graph.returned})
        return {part.phase: self._emitted(part, kept) for part in self.parts}

    def _need_operands(self, part: _Part, node: Node) -> None:
        """Note what `part` has to take from earlier parts for `node`, or to compute again."""
        for operand in dict.fromkeys(node.operands()):
            part.readers[operand] += 1
            at_hand = operand.held or operand in part.again or operand in part.saved
            if at_hand or self.home[operand] is part:
                continue
            # Outside the loop there is no coordinate for which to compute a value again.
            leaves = part.phase.once and not self.home[operand].phase.once
            if self._again(operand) and not leaves:
                part.again.add(operand)
                self._need_operands(part, operand)
            else:
                part.saved[operand] = self.num_saved
                self.num_saved += 1

    def _again(self, node: Node) -> bool:
        """Whether a later part computes a value again instead of having it saved."""
        if node not in self._cheap:
            self._cheap[node] = (
                (self.regather(node) if _is_gather(node) or _recasts(node) else _is_weight(node))
                or (node.op in _VIEWS and all(n.held or self._again(n) for n in node.operands()))
                or node.op == MeshOp("vary")
            )
        return self._cheap[node]

    def _emitted(self, part: _Part, kept: Mapping[Node, int]) -> Graph:
        """The graph of a part; `kept` counts how often each storage is saved or returned."""
        for node in self.graph.nodes:
            if node.held:
                part.mapping[node] = part.builder.copy(node, {}, phase=part.phase)
        for node in self.graph.nodes:
            if self.home[node] is part and not node.held:
                for operand in node.operands():
                    self._bring(part, operand)
                over = self._overwrites(part, node, kept)
                kwargs = {**node.kwargs, "overwrite": True} if over else None
                part.mapping[node] = part.builder.copy(node, part.mapping, kwargs=kwargs)
        return part.builder.graph(output.of(part.mapping[output.node]) for output in part.outputs)

    def _bring(self, part: _Part, node: Node) -> None:
        """Make a value of an earlier part available: compute it again, or take it."""
        if node in part.mapping:
            return
        if node in part.again:
            for operand in node.operands():
                self._bring(part, operand)
            part.mapping[node] = part.builder.copy(node, part.mapping, phase=part.phase)
            return
        part.mapping[node] = part.builder.emit(
            SAVED,
            (part.saved[node],),
            type=node.type,
            layout=node.layout,
            origin=node.origin,
            name=node.name,
        )

    def _overwrites(self, part: _Part, node: Node, kept: Mapping[Node, int]) -> bool:
        """Whether a composite may write its result over an operand: nothing else will read it."""
        known = composite_of(node.op)
        if known is None or known.overwrites is None:
            return False
        operand = node.args[known.overwrites]
        memory = storage(operand)
        alone = part.readers[operand] == 1 and kept[memory] == 1
        forward = self.home[operand].phase is Phase.FORWARD
        return operand in part.saved and alone and forward and not memory.held


def _without_unused(graph: Graph) -> Graph:
    """The graph without inputs that it does not use."""
    used = graph.returned.union(*(node.operands() for node in graph.nodes))
    return replace(graph, nodes=tuple(n for n in graph.nodes if not n.held or n in used))


def _is_gather(node: Node) -> bool:
    kind = collective_kind(node.op)
    return kind is not None and kind.gathers


def _recasts(node: Node) -> bool:
    """Whether a node brings a parameter or buffer to another element type."""
    return node.op == aten._to_copy.default and _is_weight(node)


def _is_weight(node: Node) -> bool:
    """Whether a node brings a parameter or buffer to another layout."""
    source = input_behind(node)
    return source is not None and source is not node and source.of_model

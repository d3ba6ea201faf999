"""Give every stage of a pipeline the results of a step, and what it takes that no parameter feeds.

Before:  to_copy: f32[8, 1]   = to_copy(mask, dtype=f32)
         mul: f32[8, 64]      = mul(linear, to_copy)
         transfer: f32[8, 64] = transfer(mul, to stage 1)
         mul_1: f32[8, 16]    = mul(linear_1, to_copy)
         sum: f32[]           = sum(mul_1)
After:   to_copy: f32[8, 1]   = to_copy(mask, dtype=f32)
         mul: f32[8, 64]      = mul(linear, to_copy)
         transfer: f32[8, 64] = transfer(mul, to stage 1)
         to_copy_1: f32[8, 1] = to_copy(mask, dtype=f32)
         mul_1: f32[8, 16]    = mul(linear_1, to_copy_1)
         sum: f32[]           = sum(mul_1)
         transfer_2: f32[]    = transfer(sum, to stage 0)

A mask or a table of rotations is computed in each stage that takes it, which costs less than to
send it. Every rank returns the loss and the outputs: the last stage, to which they have come, sends
them to the others once the step is over. Weights of other stages are sent before the loop over
microbatches, and their gradients after it, where there is no loop too.
Requires: a joint graph with its phases. Ensures: nodes take values of their own stage, inputs that
ranks hold, and transfers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from meshwright.compiler.errors import LayoutError, PassError
from meshwright.compiler.graph.ir import (
    INPUT,
    RETURNED,
    TRANSFER,
    Builder,
    Graph,
    InputKind,
    Node,
    Output,
    Phase,
    rewrite,
)
from meshwright.compiler.graph.text import op_text
from meshwright.dsl.statements import Stages
from meshwright.passes.statements.draft import Draft
from meshwright.passes.statements.pins import module_text


def deliver(draft: Draft) -> Draft:
    """`draft` with a graph that can be cut at its transfers."""
    if draft.num_stages == 1:
        return draft
    graph = draft.graph if draft.mesh.sequential else _phased(draft.graph)
    _check_order(graph)
    (statement,) = draft.plan.of(Stages)
    deliverer = _Deliverer(graph, draft.num_stages, statement.plan_line)
    return replace(draft, graph=deliverer.run())


def _phased(graph: Graph) -> Graph:
    """The graph with transfers of weights before the forward, and of their gradients after the
    backward."""
    given: set[Node] = set()
    before: set[Node] = set()
    after: set[Node] = set()
    for node in graph.nodes:
        argument = node.op == INPUT and node.args[0] == InputKind.ARGUMENT
        if argument or not given.isdisjoint(node.operands()):
            given.add(node)
        late = node.op == TRANSFER and node.phase is Phase.WEIGHT
        if late or not after.isdisjoint(node.operands()):
            after.add(node)
    for node in reversed(graph.nodes):
        weight = node.op == TRANSFER and node.phase is Phase.FORWARD and node not in given
        if weight or node in before:
            before.update((node, *node.operands()))
    phases = {**dict.fromkeys(before, Phase.BEFORE), **dict.fromkeys(after, Phase.AFTER)}

    def phased(builder: Builder, node: Node, mapping: Mapping[Node, Node]) -> Node | None:
        if node.held or node not in phases:
            return None
        return builder.copy(node, mapping, phase=phases[node])

    return rewrite(graph, phased)


def _check_order(graph: Graph) -> None:
    """Raises `LayoutError` for a value over all microbatches that a later stage takes: it would
    wait for a stage that waits for the end of its own loop."""
    for node in graph.nodes:
        late = node.op == TRANSFER and node.phase is Phase.AFTER
        if late and node.stage > node.args[0].stage:
            value: Node = node.args[0]
            raise LayoutError(
                f"`{op_text(value.op)}` in {module_text(value.origin.module)} depends on the "
                f"whole batch, and stage {node.stage} takes it from stage {value.stage}",
                code="not-in-a-loop",
                culprit=f"{value.name} {value.origin.source}".strip(),
                help="cut the model elsewhere, or run the whole batch at once: leave out "
                "`microbatches=`",
            )


class _Deliverer:
    def __init__(self, graph: Graph, num_stages: int, plan_line: str) -> None:
        self.graph, self.num_stages, self.plan_line = graph, num_stages, plan_line
        self.builder = Builder(graph.name, graph.mesh)
        self.mapping: dict[Node, Node] = {}
        self.copies: dict[tuple[Node, int], Node] = {}
        """What no parameter feeds, by the stage that computes it besides its own."""
        self.free: set[Node] = set()
        for node in graph.nodes:
            parameter = node.op == INPUT and node.args[0] == InputKind.PARAMETER
            if not parameter and node.op != TRANSFER and self.free.issuperset(node.operands()):
                self.free.add(node)

    def run(self) -> Graph:
        for node in self.graph.nodes:
            if node.op == TRANSFER:
                self.mapping[node] = self.builder.copy(node, self.mapping)
            else:
                self.mapping[node] = self._copy(node, node.stage)
        outputs = [each for output in self.graph.outputs for each in self._outputs(output)]
        return self.builder.graph(outputs)

    def _copy(self, node: Node, stage: int) -> Node:
        origin = replace(node.origin, stage=stage)
        return self.builder.copy(node, lambda each: self._in(each, stage), origin=origin)

    def _in(self, value: Node, stage: int) -> Node:
        """A value as a node of `stage` takes it."""
        if value.held or value.stage == stage:
            return self.mapping[value]
        if value not in self.free:
            raise PassError(
                f"stage {stage} takes `{value.name}` of stage {value.stage}, which is not sent",
                culprit=f"{value.origin.module} {value.origin.source}".strip(),
                help="report this: it is a bug",
            )
        if (value, stage) not in self.copies:
            self.copies[value, stage] = self._copy(value, stage)
        return self.copies[value, stage]

    def _outputs(self, output: Output) -> list[Output]:
        """An output of the graph in each stage that returns it."""
        if output.kind not in RETURNED:
            return [output.of(self.mapping[output.node])]
        return [output.of(self._returned(output.node, k)) for k in range(self.num_stages)]

    def _returned(self, value: Node, stage: int) -> Node:
        if value in self.free or value.stage == stage:
            return self._in(value, stage)
        self.builder.phase = Phase.RESULTS
        return self.builder.emit(
            TRANSFER,
            (self.mapping[value],),
            type=value.type,
            layout=value.placed,
            origin=replace(value.origin, stage=stage, plan_line=self.plan_line),
        )

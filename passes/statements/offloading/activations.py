"""Keep what the forward saves for the backward in host memory, or in files, between the two.

Before:  relu: f32[8, 64]               = relu(linear)
         linear_1: f32[8, 16]           = linear(relu, down_weight, down_bias)
         relu: f32[8, 64]               = saved(0)
         threshold_backward: f32[8, 64] = threshold_backward(matmul, relu, 0)
After:   relu: f32[8, 64]               = relu(linear)
         linear_1: f32[8, 16]           = linear(relu, down_weight, down_bias)
         relu_to_host: f32[8, 64]       = to_host(relu)
         relu_on_host: f32[8, 64]       = wait(relu_to_host)
         relu_on_host: f32[8, 64]       = saved(0)
         relu_to_device: f32[8, 64]     = to_device(relu_on_host)
         relu: f32[8, 64]               = wait(relu_to_device)
         threshold_backward: f32[8, 64] = threshold_backward(matmul, relu, 0)

A value leaves after its last use in the forward, and the device lets go of it a layer later, when
it has arrived. It begins to come back `prefetch` nodes before the backward takes it, by default as
many as a layer has. Views of one value travel as that value, and are taken again. What computes it
again is not saved, and so does not travel. What stays: values below 4 KiB, results of a step, what
leaves a loop, and what the backward takes so soon that it would never be gone. With `fraction=` or
`budget=` the earliest layers are taken, which are gone for longest, and no more than it says.
Requires: a graph for each phase of each stage. Ensures: values of the same bits.
Elsewhere: torch's ao::offload, Megatron's and TransformerEngine's offloading, M6-10T (2110.03888).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeAlias

from meshwright.compiler.graph.aliasing import memory_of, node_bytes
from meshwright.compiler.graph.ir import (
    SAVED,
    TO_DEVICE,
    WAIT,
    Builder,
    Graph,
    Node,
    Output,
    OutputKind,
    Phase,
    TensorType,
)
from meshwright.compiler.placing.rules.factories import makes_zeros
from meshwright.compiler.program import Place
from meshwright.compiler.schedules.actions import actions_of
from meshwright.compiler.schedules.tables import Table
from meshwright.compiler.stages import Stage
from meshwright.dsl.errors import either
from meshwright.dsl.statements import Offload
from meshwright.dsl.suggest import selectors_of
from meshwright.passes.schedule import pipeline_table
from meshwright.passes.statements.draft import Draft
from meshwright.passes.statements.missing import runs
from meshwright.passes.statements.offloading import amount
from meshwright.passes.statements.offloading.moving import Uses, by_place, emit, is_listed, leave
from meshwright.passes.statements.pins import module_text
from meshwright.passes.statements.targets import evaluated, modules_of

_BACKWARD = (Phase.BACKWARD, Phase.WEIGHT)

Layer: TypeAlias = tuple[str, tuple[int, ...]]
"""A call of a module: its path, and the numbers of this call and of those around it."""


def offload(draft: Draft) -> Draft:
    """`draft` with the activations that its `offload` statements name kept elsewhere."""
    statements = _statements(draft)
    if not statements:
        return draft
    resolved = draft.plan.resolve(Offload, modules_of(draft, Offload), what="activations")
    if draft.captured.mode != "train":
        return draft
    if draft.variant_of is None:
        _check_run(draft)
    everywhere = next((each for each in statements if not each.targets), None)
    table = pipeline_table(draft)
    stages = [
        _Offloader(each, resolved, everywhere, adjacent=_adjacent(table, each.number))
        for each in draft.stages
    ]

    def tried(counts: Mapping[int, int]) -> Draft:
        moved = tuple(each.offloaded(counts.get(each.stage.number, 0)) for each in stages)
        return replace(draft, stages=moved)

    most = {each.stage.number: len(each.budgeted) for each in stages}
    return tried(amount.fewest(draft, statements, most, tried))


def _statements(draft: Draft) -> list[Offload]:
    return [each for each in draft.plan.of(Offload) if each.what == "activations"]


def _check_run(draft: Draft) -> None:
    """Raises `PlanError` for a selector all of whose modules never run."""
    names = modules_of(draft, Offload)
    for statement in _statements(draft):
        for target in statement.targets:
            matched = target.match(names)
            if not any(runs(draft.graph, name) or evaluated(draft, name) for name in matched):
                inner = [n for n in draft.modules if n.rpartition(".")[0] in matched]
                raise draft.plan.error(
                    "P501",
                    f"`offload` needs modules that run, and {module_text(target.text)} never does",
                    target.span or statement.span,
                    help=f"name what it holds: {either(selectors_of(inner)[:3])}"
                    if inner
                    else "remove it",
                )


def _adjacent(table: Table | None, stage: int) -> bool:
    """Whether the backward of a stage always follows its forward at once."""
    for row in table.rows if table is not None else ():
        own = [each for each in actions_of(row) if each.kind in (Phase.FORWARD, *_BACKWARD)]
        for first, second in pairwise(own):
            forward = first.stage == stage and first.kind is Phase.FORWARD
            if forward and second != replace(first, kind=Phase.BACKWARD):
                return False
    return True


@dataclass(frozen=True, slots=True, eq=False)
class _Value:
    """Memory that the forward saves under some numbers: that of `base`, and of views of it."""

    base: Node
    saved: tuple[Output, ...]
    statement: Offload
    layer: Layer


class _Offloader:
    """What a stage can offload, and the stage with some of it offloaded; `adjacent` says whether
    its backward always follows its forward at once."""

    def __init__(
        self,
        stage: Stage,
        resolved: Mapping[str, Offload],
        everywhere: Offload | None,
        *,
        adjacent: bool,
    ) -> None:
        self.stage, self.resolved, self.everywhere = stage, resolved, everywhere
        self.forward, self.adjacent = stage.forward, adjacent
        self.order = {node: place for place, node in enumerate(self.forward.nodes)}
        self.last = _last_uses(self.forward)
        self.takers = _takers(stage)
        self.uses = {phase: Uses(graph) for phase, graph in stage.graphs.items()}
        window = self.uses[Phase.FORWARD].layer
        self.end = len(self.forward.nodes) - 1
        self.gone = {base: min(last + window, self.end) for base, last in self.last.items()}
        """By value: the place in the forward where it has left the device."""
        self.values = sorted(filter(self._pays, self._found()), key=lambda v: self.order[v.base])
        self.budgeted = _layers(v for v in self.values if v.statement.budget is not None)

    def offloaded(self, count: int) -> Stage:
        """The stage with what its statements say moved, of a budget's layers the first `count`."""
        chosen = set(self.budgeted[:count])
        for statement in dict.fromkeys(value.statement for value in self.values):
            own = _layers(v for v in self.values if v.statement is statement)
            chosen.update(own[: amount.share(statement, len(own))])
        values = [value for value in self.values if (value.statement, value.layer) in chosen]
        if not values:
            return self.stage
        graphs = {
            phase: _with_arrivals(graph, phase, self._coming(phase, values))
            for phase, graph in self.stage.graphs.items()
        }
        return replace(self.stage, graphs={**graphs, Phase.FORWARD: self._without(values)})

    def _found(self) -> Iterator[_Value]:
        """What is saved and may be elsewhere meanwhile."""
        returned = {n for graph in self.stage.graphs.values() for n in graph.returned}
        by_base: dict[Node, list[Output]] = {}
        staying: set[Node] = set()
        for output in self.forward.outputs:
            base = memory_of(output.node)
            saved = output.kind is OutputKind.SAVED
            phase, taken = self.takers[output.name] if saved else (None, None)
            if phase in _BACKWARD and taken not in returned:
                by_base.setdefault(base, []).append(output)
            else:
                staying.add(base)
        for base, outputs in by_base.items():
            nodes = {output.node for output in outputs}
            moved = nodes.pop() if len(nodes) == 1 else base
            statement, layer = self._said(base)
            if statement is None or base in staying or base.held or base.op == SAVED:
                continue
            if not isinstance(moved.type, TensorType) or makes_zeros(base.op, base.args):
                continue
            views = (node for output in outputs for node in _views(moved, output.node))
            alone = all(len(node.operands()) == 1 for node in views)
            if alone and node_bytes(moved, self.forward) >= amount.SMALL_BYTES:
                yield _Value(moved, tuple(outputs), statement, layer)

    def _said(self, base: Node) -> tuple[Offload | None, Layer]:
        """The statement about a value and its layer: the innermost module that one names or, where
        it names none, a member of a list."""
        origin = base.origin
        depths = range(len(origin.modules))
        for depth in reversed(depths):
            statement = self.resolved.get(origin.modules[depth][0])
            if statement is not None and statement.targets:
                return statement, _layer(base, depth)
        numbered = (d for d in depths if is_listed(origin.modules[d][0]))
        return self.everywhere, _layer(base, next(numbered, len(depths) - 1))

    def _pays(self, value: _Value) -> bool:
        """Whether a value would be gone for a while."""
        if not self.adjacent or self.gone[memory_of(value.base)] < self.end:
            return True
        phases = {self.takers[output.name][0] for output in value.saved}
        if Phase.WEIGHT in phases:
            return True
        return any(each.start > 0 for each in self._coming(Phase.BACKWARD, [value]))

    def _without(self, values: Sequence[_Value]) -> Graph:
        """The forward, with these values on their way from their last use on."""
        leaving = by_place((self.last[memory_of(value.base)], value) for value in values)
        arriving = by_place((self.gone[memory_of(value.base)], value) for value in values)
        builder = Builder(self.forward.name, self.forward.mesh)
        mapping: dict[Node, Node] = {}
        moving: dict[_Value, Node] = {}
        gone: dict[Output, Node | None] = {}
        for place, node in enumerate(self.forward.nodes):
            mapping[node] = builder.copy(node, mapping)
            for value in leaving.get(place, ()):
                moving[value] = _leave(builder, value, mapping[value.base])
            for value in arriving.get(place, ()):
                name = f"{value.base.name}_on_{value.statement.to}"
                left = emit(builder, WAIT, moving[value], name)
                numbers = self._numbers(value)
                gone |= {o: left if o.name in numbers else None for o in value.saved}
        outputs = (
            output.of(found)
            for output in self.forward.outputs
            if (found := gone.get(output, mapping[output.node])) is not None
        )
        return builder.graph(outputs)

    def _numbers(self, value: _Value) -> dict[str, Phase]:
        """The numbers under which a value stays saved: one for each graph that takes it."""
        found = {self.takers[output.name][0]: output.name for output in reversed(value.saved)}
        return {number: phase for phase, number in found.items()}

    def _coming(self, phase: Phase, values: Iterable[_Value]) -> list[_Coming]:
        """What of these values the graph of a phase takes."""
        uses, found = self.uses[phase], list[_Coming]()
        for value in values:
            number = next((n for n, own in self._numbers(value).items() if own is phase), None)
            if number is None:
                continue
            taken = {
                self.takers[output.name][1]: output.node
                for output in value.saved
                if self.takers[output.name][0] is phase
            }
            use = min(uses.first[node] for node in taken)
            ahead = uses.layer if value.statement.prefetch is None else value.statement.prefetch
            start, places = max(use - ahead, 0), uses.places
            found.append(_Coming(value, int(number), taken, start, places[start], places[use]))
        return found


@dataclass(frozen=True, slots=True, eq=False)
class _Coming:
    """A value that a graph takes: the number under which it is saved, what stands for it there,
    with the nodes of the forward, and the places where it begins to come back and has come; `start`
    counts only what computes."""

    value: _Value
    number: int
    taken: Mapping[Node, Node]
    start: int
    begins: int
    arrives: int


def _with_arrivals(graph: Graph, phase: Phase, values: Sequence[_Coming]) -> Graph:
    """A graph, with these values on their way to the device before their first use."""
    if not values:
        return graph
    builder = Builder(graph.name, graph.mesh)
    builder.phase = phase
    mapping: dict[Node, Node] = {}
    moving: dict[_Coming, Node] = {}
    replaced = {node for each in values for node in each.taken}
    begins = by_place((each.begins, each) for each in values)
    arrives = by_place((each.arrives, each) for each in values)
    for place, node in enumerate(graph.nodes):
        for each in begins.get(place, ()):
            base = each.value.base
            name = f"{base.name}_on_{each.value.statement.to}"
            saved = emit(builder, SAVED, each.number, name, like=base)
            moving[each] = emit(builder, TO_DEVICE, saved, f"{base.name}_to_device")
        for each in arrives.get(place, ()):
            back = {each.value.base: emit(builder, WAIT, moving[each], each.value.base.name)}
            for stands, made in each.taken.items():
                for view in _views(each.value.base, made):
                    if view not in back:
                        back[view] = builder.copy(view, back, phase=phase)
                mapping[stands] = back[made]
        if node not in replaced:
            mapping[node] = builder.copy(node, mapping)
    return builder.graph(output.of(mapping[output.node]) for output in graph.outputs)


def _leave(builder: Builder, value: _Value, stands: Node) -> Node:
    """Begin to bring a value to where its statement says."""
    statement = value.statement
    origin = replace(stands.origin, plan_line=statement.plan_line)
    return leave(builder, value.base, stands, Place(statement.to, statement.path), origin)


def _layer(node: Node, depth: int) -> Layer:
    origin = node.origin
    if depth < 0:
        return "", ()
    return origin.modules[depth][0], origin.calls[: depth + 1]


def _layers(values: Iterable[_Value]) -> list[tuple[Offload, Layer]]:
    """The layers of values, in the order of the forward."""
    return list(dict.fromkeys((value.statement, value.layer) for value in values))


def _last_uses(graph: Graph) -> dict[Node, int]:
    """By what has memory of its own: the place of the last node that takes it or a view of it."""
    found: dict[Node, int] = {}
    for place, node in enumerate(graph.nodes):
        for each in (node, *node.operands()):
            found[memory_of(each)] = place
    return found


def _takers(stage: Stage) -> dict[str, tuple[Phase, Node]]:
    """By number of a saved value: the phase of the graph that takes it, and what stands for it
    there."""
    return {
        str(node.args[0]): (phase, node)
        for phase, graph in stage.graphs.items()
        for node in graph.nodes
        if node.op == SAVED
    }


def _views(base: Node, node: Node) -> list[Node]:
    """The views that lead from `base` to `node`, in order."""
    found: list[Node] = []
    while node is not base:
        found.append(node)
        node = node.operands()[0]
    return found[::-1]

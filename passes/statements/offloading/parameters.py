"""Keep parameters, their gradients and an optimizer's state in host memory or in files.

Before:  linear: f32[8, 64]               = linear(x, up_weight, up_bias)
         bucket: f32[2128]                = mesh::bucket(mm, sum_1, mm_1, sum_2)
         up_weight_grad: f32[64, 16]      = mesh::bucket_item(bucket, 2)
After:   up_weight_to_device: f32[64, 16] = to_device(up_weight)
         up_weight_on_device: f32[64, 16] = wait(up_weight_to_device)
         linear: f32[8, 64]               = linear(x, up_weight_on_device, up_bias)
         bucket: f32[1024]                = mesh::bucket(mm_1, leaves=True)
         bucket_to_host: f32[1024]        = to_host(bucket)
         bucket_on_host: f32[1024]        = wait(bucket_to_host)
         up_weight_grad: f32[64, 16]      = mesh::bucket_item(bucket_on_host, 0)

A parameter comes to the device in each graph that takes it, `prefetch` nodes before its first use,
by default as many as a layer has, and goes with its last; between uses that are layers apart it
goes too. What a rank brings is what it stores: of a parameter that is split, its part. Gradients
leave as they are reduced, a layer's in one bucket, and the CPU updates there. With `fraction=` or
`budget=`, the layers whose parameters are taken are spread evenly, so that each has time to come;
of an optimizer alone they are the last, whose gradients are there first. Parameters below 4 KiB
stay.
Requires: a graph for each phase of each stage. Ensures: values of the same bits.
Elsewhere: M6-10T (2110.03888), ZeRO-Offload (2101.06840), ZeRO-Infinity (2104.07857).
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch

from meshwright.compiler.graph.aliasing import is_part
from meshwright.compiler.graph.ir import (
    GETITEM,
    INPUT,
    TO_DEVICE,
    WAIT,
    Builder,
    Graph,
    InputKind,
    Node,
    OutputKind,
    Phase,
    TensorType,
)
from meshwright.compiler.graph.transfers import moves
from meshwright.compiler.placing.frame import BUCKET, BUCKET_ITEM
from meshwright.compiler.program import Kept, Place
from meshwright.dsl.statements import Offload
from meshwright.passes.statements.draft import Draft, Movable
from meshwright.passes.statements.offloading import amount
from meshwright.passes.statements.offloading.moving import Uses, by_place, emit, leave
from meshwright.passes.statements.pins import module_text
from meshwright.passes.statements.targets import of_parameters

_Layer: TypeAlias = tuple[Offload, str]
_JOINING = (BUCKET, GETITEM, torch.ops.aten._to_copy.default)
"""What brings gradients together."""
_OPTIONS = ("fraction", "budget", "prefetch", "to", "path")


def movable(draft: Draft) -> Draft:
    """`draft` with what its statements would have kept elsewhere, by parameter."""
    if not any(each.what != "activations" for each in draft.plan.of(Offload)):
        return draft
    values = of_parameters(draft, Offload, _options, what="parameters")
    updates = of_parameters(draft, Offload, _options, what="optimizer")
    if draft.variant_of is None:
        _check_any(draft, {*values.values(), *updates.values()})
    found: dict[str, Movable] = {}
    for name, parameter in draft.captured.parameters.items():
        trained = parameter.requires_grad and draft.captured.mode == "train"
        each = Movable(_layer(name), values.get(name), updates.get(name) if trained else None)
        large = TensorType.of(parameter).num_bytes >= max(amount.SMALL_BYTES, 1)
        if large and (each.value or each.update):
            found[name] = each
    return replace(draft, movable=found)


def _options(statement: Offload) -> object:
    return tuple(getattr(statement, option) for option in _OPTIONS)


def _layer(name: str) -> str:
    """The layer that has a parameter: the outermost member of a list, or else its own module."""
    parts = name.split(".")
    listed = (place for place, part in enumerate(parts) if part.isdigit())
    return ".".join(parts[: next(listed, len(parts) - 2) + 1])


def _check_any(draft: Draft, found: Container[Offload]) -> None:
    """Raises `PlanError` for a statement about modules that hold no parameters."""
    for statement in draft.plan.of(Offload):
        if statement.what != "activations" and statement.targets and statement not in found:
            target = statement.targets[0]
            raise draft.plan.error(
                "P501",
                f"`offload {statement.what}` needs parameters, and {module_text(target.text)} has "
                "none, or a statement that is more specific has all of them",
                target.span or statement.span,
                help="name modules that hold parameters, or remove it",
            )


def keep_elsewhere(draft: Draft) -> Draft:
    """`draft` with the parameters and gradients that it says moved; of a variant, as the program
    keeps them."""
    if draft.variant_of is not None:
        return _moved(draft, draft.kept)
    if not draft.movable:
        return draft
    choice = _Choice(draft)

    def tried(counts: Mapping[int, int]) -> Draft:
        return _moved(draft, choice.kept(counts))

    statements = {s for each in draft.movable.values() for s in (each.value, each.update) if s}
    return tried(amount.fewest(draft, statements, choice.most, tried))


class _Choice:
    """What is kept where, given how many layers of each stage a budget takes, of `most`."""

    def __init__(self, draft: Draft) -> None:
        self.movable = draft.movable
        self.values = _layers((m.value, m.layer) for m in self.movable.values())
        self.updates = _layers((m.update, m.layer) for m in self.movable.values())
        stages = {m.layer: draft.holders.get(name, (0,))[0] for name, m in self.movable.items()}
        self.by_stage = {
            stage.number: tuple(
                [each for each in layers if each[0].budget and stages[each[1]] == stage.number]
                for layers in (self.updates, self.values)
            )
            for stage in draft.stages
        }
        self.most = {number: sum(map(len, each)) for number, each in self.by_stage.items()}

    def kept(self, counts: Mapping[int, int]) -> dict[str, Kept]:
        """Where each parameter is kept of which something is elsewhere."""
        values, updates = set[_Layer](), set[_Layer]()
        for statement in dict.fromkeys(each for each, _ in self.values):
            own = [each for each in self.values if each[0] is statement]
            values.update(_spread(own, amount.share(statement, len(own))))
        for statement in dict.fromkeys(each for each, _ in self.updates):
            own = [each for each in self.updates if each[0] is statement]
            updates.update(_last(own, amount.share(statement, len(own))))
        for number, count in counts.items():
            # An optimizer's state is not taken in a step: it goes first.
            last, spread = self.by_stage[number]
            updates.update(_last(last, min(count, len(last))))
            values.update(_spread(spread, max(count - len(last), 0)))
        found: dict[str, Kept] = {}
        for name, each in self.movable.items():
            value = _place(each.value, each.layer, values)
            update = _place(each.update, each.layer, updates)
            if value.away or update.away:
                found[name] = Kept(value, update if update.away else value)
        return found


def _layers(found: Iterable[tuple[Offload | None, str]]) -> list[_Layer]:
    """The layers of statements, in the order of the model."""
    return list(dict.fromkeys((statement, layer) for statement, layer in found if statement))


def _spread(layers: Sequence[_Layer], count: int) -> list[_Layer]:
    """So many of these layers, as far apart as they can be."""
    return [layers[(2 * i + 1) * len(layers) // (2 * count)] for i in range(count)]


def _last(layers: Sequence[_Layer], count: int) -> Sequence[_Layer]:
    return layers[len(layers) - count :]


def _place(statement: Offload | None, layer: str, chosen: set[_Layer]) -> Place:
    if statement is None or (statement, layer) not in chosen:
        return Place()
    return Place(statement.to, statement.path)


def _moved(draft: Draft, kept: Mapping[str, Kept]) -> Draft:
    """`draft` with what is `kept` elsewhere moved in every graph."""
    if not kept:
        return draft
    stages = tuple(
        replace(
            stage,
            graphs={
                phase: _Mover(draft.movable, kept, graph, phase).run()
                for phase, graph in stage.graphs.items()
            },
        )
        for stage in draft.stages
    )
    return replace(draft, stages=stages, kept=kept)


@dataclass(frozen=True, slots=True, eq=False)
class _Visit:
    """A time that a parameter is on the device: where it begins to come, where it has come, and the
    node that takes it first."""

    begins: int
    arrives: int
    reader: Node


@dataclass(frozen=True, slots=True, eq=False)
class _Departure:
    """Gradients that leave: the node that has them, and where they are brought together, begin to
    go and are gone. `chain` is what brings them together, which is as early as it can be."""

    value: Node
    place: Place
    chain: tuple[Node, ...]
    joins: int
    leaves: int
    gone: int


class _Mover:
    """One graph, in which parameters come and gradients leave."""

    def __init__(
        self,
        movable: Mapping[str, Movable],
        kept: Mapping[str, Kept],
        graph: Graph,
        phase: Phase,
    ) -> None:
        self.movable, self.kept, self.graph = movable, kept, graph
        self.computed = Uses(graph)
        self.order = {node: place for place, node in enumerate(graph.nodes)}
        self.users = graph.users()
        self.of: dict[Node, Node] = {}
        """By parameter that comes, and by view of one: the parameter."""
        for node in graph.nodes:
            if node.op == INPUT and node.args[0] == InputKind.PARAMETER:
                if kept.get(node.args[1], Kept()).value.away:
                    self.of[node] = node
            elif is_part(node) and node.operands()[0] in self.of:
                self.of[node] = self.of[node.operands()[0]]
        self.visits = {
            source: tuple(self._visits(source, readers))
            for source, readers in self._readers().items()
        }
        self.departures = list(self._departures())
        self.builder = Builder(graph.name, graph.mesh)
        self.builder.phase = phase
        self.mapping: dict[Node, Node] = {}
        self.held: dict[Node, Node] = {}
        """The inputs, as ranks keep them."""

    def run(self) -> Graph:
        """The graph with all of it moved."""
        if not self.departures and not any(self.visits.values()):
            return self.graph
        begins = by_place((v.begins, (n, v)) for n, each in self.visits.items() for v in each)
        arrives = by_place((v.arrives, (n, v)) for n, each in self.visits.items() for v in each)
        joins = by_place((each.joins, each) for each in self.departures)
        leaves = by_place((each.leaves, each) for each in self.departures)
        gone = by_place((each.gone, each) for each in self.departures)
        early = {node for each in self.departures for node in each.chain}
        late = {each.value for each in self.departures}
        moving: dict[object, Node] = {}
        items: list[Node] = []
        for place, node in enumerate(self.graph.nodes):
            for source, visit in begins.get(place, ()):
                moving[visit] = self._begin(source, visit)
            for source, visit in arrives.get(place, ()):
                self._arrive(source, moving[visit])
            if node.op == BUCKET_ITEM and node.args[0] in late:
                items.append(node)
            elif node not in early and (node not in self.of or node.op == INPUT):
                self.mapping[node] = self.builder.copy(node, self._operand)
                self.held[node] = self.mapping[node]
            for each in joins.get(place, ()):
                self._join(each)
            for each in leaves.get(place, ()):
                moving[each] = self._leave(each)
            for each in gone.get(place, ()):
                name = f"{each.value.name}_on_{each.place.to}"
                self.mapping[each.value] = emit(self.builder, WAIT, moving[each], name)
        for node in items:
            self.mapping[node] = self.builder.copy(node, self.mapping)
        return self.builder.graph(each.of(self._operand(each.node)) for each in self.graph.outputs)

    def _operand(self, node: Node) -> Node:
        """What stands for a node: of a view of what has come, one that is taken again."""
        if node not in self.mapping and node in self.of:
            self.mapping[node] = self.builder.copy(node, self._operand)
        return self.mapping[node]

    def _begin(self, source: Node, visit: _Visit) -> Node:
        statement = self.movable[source.args[1]].value
        line = statement.plan_line if statement is not None else ""
        return self.builder.emit(
            TO_DEVICE,
            (self.held[source],),
            type=source.type,
            layout=source.layout,
            origin=replace(visit.reader.origin, plan_line=line),
            name=f"{source.name}_to_device",
        )

    def _arrive(self, source: Node, moving: Node) -> None:
        """Let a parameter stand for itself, and nothing yet for its views."""
        for node, own in self.of.items():
            if own is source:
                self.mapping.pop(node, None)
        self.mapping[source] = emit(self.builder, WAIT, moving, f"{source.name}_on_device")

    def _join(self, departure: _Departure) -> None:
        for node in departure.chain:
            kwargs = {**node.kwargs, "leaves": True} if node.op == BUCKET else None
            self.mapping[node] = self.builder.copy(node, self._operand, kwargs=kwargs)

    def _leave(self, departure: _Departure) -> Node:
        value = departure.value
        return leave(self.builder, value, self.mapping[value], departure.place, value.origin)

    def _visits(self, source: Node, readers: Iterable[tuple[int, Node]]) -> Iterator[_Visit]:
        """The times that a parameter is on the device, in order."""
        statement = self.movable[source.args[1]].value
        window = self.computed.layer
        ahead = window if statement is None or statement.prefetch is None else statement.prefetch
        last: int | None = None
        for use, reader in readers:
            if last is None or use - last > 2 * window:
                # What is gathered is so a layer ahead.
                arrives = max(use - window, 0) if moves(reader) else use
                begins = max(arrives - ahead, 0)
                places = self.computed.places
                yield _Visit(places[begins], places[arrives], reader)
            last = use

    def _readers(self) -> dict[Node, list[tuple[int, Node]]]:
        """By parameter that comes: what takes it or a view of it, with its place among what
        computes."""
        found: dict[Node, dict[Node, int]] = {own: {} for own in self.of.values()}
        for use, place in enumerate(self.computed.places):
            node = self.graph.nodes[place]
            for operand in node.operands():
                own = self.of.get(operand)
                if own is not None and self.of.get(node) is not own:
                    found[own][node] = use
        readers = {own: [(u, n) for n, u in each.items()] for own, each in found.items()}
        for own in {self.of[node] for node in self.graph.returned if node in self.of}:
            readers[own].append((len(self.computed.places) - 1, self.graph.nodes[-1]))
        return readers

    def _departures(self) -> Iterator[_Departure]:
        """The gradients that leave, each bucket at once."""
        found: dict[Node, str] = {}
        for output in self.graph.outputs_of(OutputKind.GRADIENT):
            found.setdefault(output.node.args[0], output.name)
        end, window = len(self.graph.nodes) - 1, self.computed.layer
        for value, name in found.items():
            place = self.kept.get(name, Kept()).update
            if place.away:
                chain = self._chain(value)
                sources = {each for node in chain for each in node.operands()} - set(chain)
                joins = max(self.order[each] for each in sources)
                # What is being sent has time to come.
                joins = min(joins + window * any(map(moves, sources)), end)
                leaves = min(joins + window * moves(value), end)
                yield _Departure(value, place, chain, joins, leaves, min(leaves + window, end))

    def _chain(self, value: Node) -> tuple[Node, ...]:
        """The bucket behind a value, and what leads to it from gradients that are packed together
        or in another type; in order."""
        found: dict[Node, None] = {}
        pending = [value]
        while pending:
            node = pending.pop()
            alone = all(user in found for user in self.users[node])
            if node is value or (alone and (node.op in _JOINING or is_part(node))):
                found[node] = None
                pending += [each for each in node.operands() if each not in found]
        return tuple(sorted(found, key=self.order.__getitem__))

"""Give every node a layout, and make every change of layout an explicit collective.

Before:  linear: f32[8, 64] = linear(x, up_weight, up_bias)
         relu: f32[8, 64]   = relu(linear)
After:   slice: f32[8@dp, 16@tp]           = slice(x, tp)
         vary: f32[64, 16@tp] varying(dp)  = vary(up_weight, dp)
         linear: f32[8@dp, 64] partial(tp) = linear(slice, vary)
         all_reduce: f32[8@dp, 64]         = all_reduce(linear, tp)
         vary_1: f32[64] varying(dp)       = vary(up_bias, dp)
         add: f32[8@dp, 64]                = add(all_reduce, vary_1)
         relu: f32[8@dp, 64]               = relu(add)

Layouts flow forward from the parameters and inputs that the plan has pinned. Where operands
disagree the rule engine takes the cheapest way, and the `vary` rule inserts what makes gradients
right.
Requires: pins that divide. Ensures: every node is placed as its rule allows; outputs are whole.
Elsewhere: Shardy's propagation and insert-explicit-reshards in one.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from meshwright.compiler.graph.ir import (
    GETITEM,
    INPUT,
    Builder,
    Node,
    Origin,
    Output,
    OutputKind,
    map_nodes,
)
from meshwright.compiler.graph.slots import call_operands
from meshwright.compiler.layout.extents import Padding, padding_between
from meshwright.compiler.layout.layout import Layout, replicated
from meshwright.compiler.layout.reshard import Collective
from meshwright.compiler.placing.emit import Emitter
from meshwright.compiler.placing.movement import Reason
from meshwright.dsl.statements import Stages
from meshwright.passes.placing.layouts import Layouts, lay_out
from meshwright.passes.placing.reasons import Reasons
from meshwright.passes.statements.draft import Draft, Pin, device_type, input_key
from meshwright.passes.statements.pins import pin_lines
from meshwright.passes.statements.relays import Arriving
from meshwright.passes.statements.stages import Source, sources

aten = torch.ops.aten


def partition(draft: Draft) -> Draft:
    """Place every node of `draft.graph`."""
    return _Partitioner(lay_out(draft)).run()


class _Partitioner:
    def __init__(self, layouts: Layouts) -> None:
        self.layouts, self.marked, self.choice = layouts, layouts.marked, layouts.choice
        self.reasons = Reasons(layouts.draft, layouts.marked, layouts.choice)
        self.draft = draft = replace(layouts.draft, graph=self.marked.graph)
        self.graph = self.marked.graph
        self.emitter = Emitter(Builder(draft.graph.name, draft.mesh), device=device_type(draft))
        line = "".join(each.plan_line for each in draft.plan.of(Stages))
        self.sources = sources(draft.graph)
        self.stages: list[Arriving] = []
        for number in range(draft.num_stages):
            self.stages.append(Arriving(number, self.stages, self.sources, self.emitter, line))
        self.mapping = self.stages[0]
        """What stands for each node in the stage of the node that is placed."""
        self.stored: dict[Node, tuple[Node, Layout, Padding | None, str]] = {}
        """What stands for inputs, and casts of inputs, that are used in another layout: which it
        is, what storage adds to it, and the line of the plan behind that in which they are
        stored."""
        self.brought: set[tuple[Node, int]] = set()
        """Those that are in the layout in which they are used, and in which stage."""

    def run(self) -> Draft:
        for node in self.graph.nodes:
            self.mapping = self.stages[node.stage]
            if node.op == aten._to_copy.default and self._cast_stored(node):
                continue
            for operand in node.operands():
                self._use(operand, node.origin)
            self.mapping[node] = self._place(node)
        outputs = tuple(output.of(self._output(output)) for output in self.graph.outputs)
        return replace(
            self.draft,
            graph=self.emitter.builder.graph(outputs),
            movements=tuple(self.emitter.movements),
        )

    def _place(self, node: Node) -> Node:
        if node.op == INPUT:
            return self._input(node)
        if node.op == GETITEM:
            source = self.mapping[node.args[0]]
            return self.emitter.item(source, node.args[1], node.origin, name=node.name)
        if self.marked.move(node):
            (value,), (layout,) = node.operands(), self.choice.placements[node].operands
            return self.emitter.reshard(
                self.mapping[value], layout, node.origin, why=partial(self._moved, value, node)
            )
        return self._call(node)

    def _call(self, node: Node) -> Node:
        args = map_nodes(node.args, self.mapping.__getitem__)
        kwargs = {key: map_nodes(v, self.mapping.__getitem__) for key, v in node.kwargs.items()}
        operands, placement = call_operands(node.args, node.kwargs), self.choice.placements[node]

        def why(place: int, collective: Collective) -> Reason:
            asked = self.layouts.asks(node, placement, place, collective)
            lines = self.reasons.behind(collective, operands[place], node)
            return Reason(asked, lines, self.reasons.instead(node))

        return self.emitter.call(
            node.op,
            args,
            kwargs,
            origin=node.origin,
            type=node.type,
            placement=placement,
            why=why,
            requires_grad=node.requires_grad,
            name=node.name,
        )

    def _moved(self, value: Node, user: Node | None, collective: Collective) -> Reason:
        """The reason for what the plan wrote, or results are."""
        return Reason(lines=self.reasons.behind(collective, value, user))

    def _input(self, node: Node) -> Node:
        key, mesh = input_key(node), self.draft.mesh
        pin, stored = self.draft.inputs.get(key), self.draft.stored.get(key)
        layout = pin.layout if pin else replicated(node.tensor.shape)
        # Each rank is given the whole, of which coordinates of a sequential axis take parts.
        held = stored.layout if stored else layout
        if mesh.sequential.intersection(held.split_axes):
            held = held.drop_split(mesh.sequential, mesh)
        new = self.emitter.builder.emit(
            INPUT,
            node.args,
            type=replace(node.tensor, shape=held.shape),
            layout=held.canonical(mesh),
            origin=node.origin,
            requires_grad=node.requires_grad,
            name=node.name,
        )
        if stored or held != layout:
            padding = padding_between(layout, stored.layout, mesh) if stored else None
            self.stored[node] = new, layout, padding, pin_lines(stored or pin)
        return new

    def _cast_stored(self, node: Node) -> bool:
        """Cast a weight before it is brought to the layout in which it is used; returns whether
        `node` is such a cast."""
        source: Node = node.args[0]
        if source not in self.stored or not source.of_model or self._is_brought(source):
            return False
        new = self.mapping[node] = self.emitter.call(
            node.op,
            (self._as_stored(source),),
            dict(node.kwargs),
            origin=node.origin,
            requires_grad=node.requires_grad,
            name=node.name,
        )
        self.stored[node] = new, *self.stored[source][1:]
        return True

    def _stage_of(self, node: Node) -> int:
        """The stage in which a stored value is brought to the layout in which it is used: each that
        uses a weight, which is sent as it is stored."""
        weight = self.sources[node] is Source.WEIGHT
        return self.mapping.number if weight else node.stage

    def _is_brought(self, node: Node) -> bool:
        return (node, self._stage_of(node)) in self.brought

    def _as_stored(self, node: Node) -> Node:
        """A weight as it is stored, in the stage that uses it."""
        value, number = self.stored[node][0], self._stage_of(node)
        return value if number == node.stage else self.stages[number].received(node, value)

    def _use(self, node: Node, user: Origin) -> None:
        """Bring a weight to the layout in which operators use it, before the first of them, whose
        module it is counted for."""
        if node not in self.stored or self._is_brought(node):
            return
        number = self._stage_of(node)
        self.brought.add((node, number))
        _, layout, padding, line = self.stored[node]
        held = self._as_stored(node)
        origin = replace(user, plan_line=line, stage=number)
        value = self._cut(held, padding, layout, origin) if padding else held
        value = self.emitter.reshard(value, layout, origin)
        self.stages[number][node] = value

    def _cut(self, held: Node, padding: Padding, layout: Layout, origin: Origin) -> Node:
        """A weight gathered from the ranks that share what each uses, without what storage adds."""
        dim, start, pieces = padding.dim, 0, []
        call = partial(self.emitter.call, origin=origin, requires_grad=held.requires_grad)
        sharing = set(held.placed.split_axes) - set(layout.split_axes)
        whole = held.placed.drop_split(sharing, self.draft.mesh)
        value = self.emitter.reshard(held, whole, origin)
        outer, inner = value.tensor.shape[:dim], value.tensor.shape[dim + 1 :]
        for extent in padding.extents:
            piece = value
            if len(padding.extents) > 1:
                piece = call(aten.slice.Tensor, (value, dim, start, start + extent.stored))
            if extent.size == extent.padded:
                pass
            elif extent.before > 1:
                apart = (*outer, extent.before, extent.padded, *inner)
                piece = call(aten.view.default, (piece, apart))
                piece = call(aten.slice.Tensor, (piece, dim + 1, 0, extent.size))
                piece = call(aten.view.default, (piece, (*outer, extent.true, *inner)))
            else:
                piece = call(aten.slice.Tensor, (piece, dim, 0, extent.size))
            pieces.append(piece)
            start += extent.stored
        return pieces[0] if len(pieces) == 1 else call(aten.cat.default, (tuple(pieces), dim))

    def _output(self, output: Output) -> Node:
        """Results are whole on every rank; a buffer's new value is laid out as the buffer."""
        node = output.node
        stage = node.stage if output.kind is OutputKind.BUFFER else self.draft.num_stages - 1
        self.mapping = self.stages[stage]
        self._use(node, node.origin)
        pin: Pin | None = None
        if output.kind is OutputKind.BUFFER:
            pin = self.draft.stored.get(output.name) or self.draft.inputs.get(output.name)
        layout = pin.layout if pin else replicated(node.tensor.shape)
        value = self.mapping[node]
        if value.placed.varying:
            layout = layout.add_varying(value.placed.varying)
        if layout.shape != value.tensor.shape:
            value = self._lengthened(value, layout.shape)
        origin, why = replace(node.origin, stage=stage), partial(self._moved, node, None)
        return self.emitter.reshard(value, layout, origin, why=why)

    def _lengthened(self, value: Node, shape: tuple[int, ...]) -> Node:
        """`value` with the zeros that storage adds."""
        added = (size - own for size, own in zip(shape, value.tensor.shape, strict=True))
        # From the last dim to the first, how much is added before it and after it.
        pads = [each for more in reversed(list(added)) for each in (0, more)]
        args = (value, pads)
        return self.emitter.call(aten.constant_pad_nd.default, args, origin=value.origin)

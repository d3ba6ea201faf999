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

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch

from meshwright.compiler.autodiff.decompositions import DECOMPOSITIONS, decompose
from meshwright.compiler.composites.experts import Combine
from meshwright.compiler.graph.fragment import FragmentCall
from meshwright.compiler.graph.ir import (
    GETITEM,
    INPUT,
    Arg,
    Builder,
    Node,
    Op,
    Origin,
    Output,
    OutputKind,
    TensorType,
    map_nodes,
    nodes_in,
)
from meshwright.compiler.graph.slots import call_operands, slotted
from meshwright.compiler.layout.extents import Padding, padding_between
from meshwright.compiler.layout.factors import dim_axes
from meshwright.compiler.layout.layout import Layout, replicated
from meshwright.compiler.layout.reshard import Collective
from meshwright.compiler.placing.emit import Emitter, is_floating
from meshwright.dsl.statements import Context, Experts, Stages
from meshwright.passes.rewriting.recognise import repeated_heads
from meshwright.passes.statements.draft import Draft, Pin, input_key
from meshwright.passes.statements.linears import contracted_dim, is_convolution
from meshwright.passes.statements.pins import pin_lines
from meshwright.passes.statements.relays import Arriving
from meshwright.passes.statements.sequences.attention import (
    ATTENTION,
    HEADS,
    TOKENS,
    Contexts,
    check_heads,
    repeats,
    uneven_heads,
)
from meshwright.passes.statements.sequences.regions import Sequences
from meshwright.passes.statements.stages import Source, sources

aten = torch.ops.aten

_VIEWS = {
    aten.view.default,
    aten.t.default,
    aten.transpose.int,
    aten.permute.default,
    aten._to_copy.default,
}
"""Operators through which a parameter's layout stays the one the plan wrote."""


def partition(draft: Draft) -> Draft:
    """Place every node of `draft.graph`."""
    return _Partitioner(draft).run()


class _Partitioner:
    def __init__(self, draft: Draft) -> None:
        self.draft, self.graph = draft, draft.graph
        self.emitter = Emitter(Builder(draft.graph.name, draft.mesh))
        line = "".join(each.plan_line for each in draft.plan.of(Stages))
        self.sources = sources(draft.graph)
        self.stages: list[Arriving] = []
        for number in range(draft.num_stages):
            self.stages.append(Arriving(number, self.stages, self.sources, self.emitter, line))
        self.mapping = self.stages[0]
        """What stands for each node in the stage of the node that is placed."""
        self.results: dict[Node, list[Node]] = {}
        """The results of operators that were placed in pieces."""
        self.stored: dict[Node, tuple[Node, Layout, Padding | None, str]] = {}
        """What stands for inputs, and casts of inputs, that are used in another layout: which it
        is, what storage adds to it, and the line of the plan behind that in which they are
        stored."""
        self.brought: set[tuple[Node, int]] = set()
        """Those that are in the layout in which they are used, and in which stage."""
        self.users = draft.graph.users()
        self.sequences = Sequences(draft.graph, draft.regions, draft.attending, draft.mesh)
        self.returning: set[Node] = set()
        """What experts have computed, for the tokens that it comes back to."""
        self.exchanged = {axis for each in draft.plan.of(Experts) for axis in each.over}
        self.emitter.planned = self._planned
        self.contexts = Contexts(draft.graph, draft.attending, draft.mesh)

    def _planned(self, value: Node, collective: Collective) -> bool:
        """Whether the plan asks for this change of a value's layout."""
        returns = value in self.returning and self.exchanged.issuperset(collective.axes)
        return returns or self.sequences.moves(value, collective)

    def run(self) -> Draft:
        for node in self.graph.nodes:
            self.mapping = self.stages[node.stage]
            self.sequences.consider(node)
            if node.op == aten._to_copy.default and self._cast_stored(node):
                continue
            for operand in node.operands():
                self._use(operand, node.origin)
            self._enter(node)
            if node.op == Combine.op:
                self.returning.add(self.mapping[node.args[0]])
            new = self._place(node)
            if node in self.draft.values:
                pin = self.draft.values[node]
                new = self._to(new, pin.layout, node, pin_lines(pin))
            self.mapping[node] = new
            if len(self.users[node]) > 1 and isinstance(new.type, TensorType):
                self.emitter.shared.add(new)
        outputs = tuple(output.of(self._output(output)) for output in self.graph.outputs)
        return replace(
            self.draft,
            graph=self.emitter.builder.graph(outputs),
            movements=tuple(self.emitter.movements),
        )

    def _enter(self, node: Node) -> None:
        """Bring what enters a module with this node to the layout that the plan wrote for it."""
        for value, pin in self.draft.entering.get(node, ()):
            new = self._to(self.mapping[value], pin.layout, node, pin_lines(pin))
            self.mapping[value] = new
        for value, statement in self.contexts.entries.get(node, ()):
            layout = self.contexts.split(self.mapping[value].placed, 1, statement.over)
            if layout is not None:
                line = statement.plan_line
                self.mapping[value] = self._to(self.mapping[value], layout, node, line)
        for value, flow in self.sequences.entries.get(node, ()):
            layout = self.sequences.split(self.mapping[value], flow)
            if layout is not None:
                line = flow.region.statement.plan_line
                self.mapping[value] = self._to(self.mapping[value], layout, node, line)

    def _to(self, value: Node, layout: Layout, node: Node, line: str = "") -> Node:
        """`value` in `layout`, because of a line of the plan; its varying axes stay, since each use
        asks for its own."""
        layout = layout.canonical(self.draft.mesh)
        if value.placed.dims == layout.dims and value.placed.partial == layout.partial:
            return value
        return self.emitter.reshard(value, layout, replace(node.origin, plan_line=line))

    def _place(self, node: Node) -> Node:
        if node.op == INPUT:
            return self._input(node)
        if node.op == GETITEM:
            if node.args[0] in self.results:
                return self.results[node.args[0]][node.args[1]]
            source = self.mapping[node.args[0]]
            return self.emitter.item(source, node.args[1], node.origin, name=node.name)
        if node.op == torch.ops.mesh.layout.default:
            return self.mapping[node.args[0]]
        return (
            self._biased(node)
            or self._attention(node)
            or self._in_pieces(node)
            or self._call(node, node.op, node.args)
        )

    def _call(self, node: Node, op: Op, args: tuple[Arg, ...]) -> Node:
        args, kwargs, proposals = self._arguments(node, args)
        new = self.emitter.call(
            op,
            args,
            kwargs,
            origin=node.origin,
            type=node.type,
            proposals=proposals,
            requires_grad=node.requires_grad,
            # A result is made whole anyway: cutting its padding off costs no gather of its own.
            free=op == aten.slice.Tensor and not self.users[node],
            name=node.name,
        )
        if op in _VIEWS and args[0] in self.emitter.explicit:
            self.emitter.explicit.add(new)
        return new

    def _arguments(
        self, node: Node, args: tuple[Arg, ...]
    ) -> tuple[tuple[Arg, ...], dict[str, Arg], Mapping[Node, Layout]]:
        """The arguments of a call on new nodes, and what `Sequences.proposals` says of them."""
        args = map_nodes(args, lambda n: self.mapping[n] if n in self.users else n)
        kwargs = {key: map_nodes(v, self.mapping.__getitem__) for key, v in node.kwargs.items()}
        return args, kwargs, self.sequences.proposals(nodes_in((args, *kwargs.values())))

    def _biased(self, node: Node) -> Node | None:
        """A linear map whose sum over input features stays pending gets its bias after the sum."""
        found = _bias_apart(node)
        if found is None:
            return None
        op, args, bias, contracted = found
        if not dim_axes(self.mapping[args[1]].placed.dims[contracted]):
            return None
        product = self._call(node, op, args)
        added = self.mapping[bias]
        if is_convolution(op):
            shape = (*bias.tensor.shape, *[1] * (len(args[1].tensor.shape) - 2))
            added = self._added(node, aten.view.default, (added, shape), added)
        return self._added(node, aten.add.Tensor, (product, added), node)

    def _added(self, node: Node, op: Op, args: tuple[Arg, ...], like: Node) -> Node:
        """A call that `node` needs besides its own operator, differentiable as `like` is."""
        return self.emitter.call(
            op,
            args,
            origin=node.origin,
            proposals=self.sequences.proposals(nodes_in(args)),
            requires_grad=like.requires_grad,
        )

    def _attention(self, node: Node) -> Node | None:
        """Attention, where it is split along the sequence as a statement says."""
        if node.op not in ATTENTION:
            return None
        statement = self.contexts.statement_of(node)
        if statement is not None and statement.method == "ulysses":
            return self._by_head(node, statement)
        if statement is not None:
            check_heads(self.draft, node, self.mapping[node.args[0]].placed, statement)
        return self._call(node, node.op, self._grouped(node))

    def _grouped(self, node: Node) -> tuple[Arg, ...]:
        """The arguments of attention, of which keys and values are those that a model repeats.

        Where there are fewer heads of them than ranks, each rank repeats them all and takes its
        own.
        """
        q, k, v, *rest = node.args
        keys, values = _single_heads(node)
        grouped = (q, keys, values, *rest)
        if (keys, values) == (k, v) or (least := self._moved(node, grouped)) == 0.0:
            return grouped
        axes = dim_axes(self.mapping[q].placed.dims[1])
        args = (q, k, v, *rest)
        held = [self.mapping[x].placed.state(axis) for x in (keys, values) for axis in axes]
        if axes and set(held) == {"replicated"}:
            count = k.tensor.shape[HEADS]
            own = (self._repeated(node, self.mapping[x], count, axes) for x in (keys, values))
            args = (q, *own, *rest)
        return args if self._moved(node, args) < least else grouped

    def _by_head(self, node: Node, statement: Context) -> Node:
        """Attention that is split by head over the axes over which its operands are split along the
        sequence."""
        line, over = statement.plan_line, statement.over
        q, *rest = node.args[:1] + _single_heads(node)
        q = self.mapping[q]
        by_head = self.contexts.split(q.placed, HEADS, over)
        if by_head is None:
            raise uneven_heads(self.draft, node, q.placed, statement)
        axes = dim_axes(by_head.dims[HEADS])
        operands = [self._to(q, by_head, node, line)]
        for x in rest:
            groups, ranks = x.tensor.shape[HEADS], self.draft.mesh.size(axes)
            x = self._repeated(node, self.mapping[x], groups * repeats(groups, ranks), axes)
            layout = self.contexts.split(x.placed, HEADS, axes)
            assert layout is not None, x.name
            operands.append(self._to(x, layout, node, line))
        new = self._call(node, node.op, (*operands, *node.args[3:]))
        out, lse = (self.emitter.item(new, i, node.origin) for i in range(2))
        by_token = self.contexts.split(out.placed, TOKENS, over)
        assert by_token is not None, out.name
        self.results[node] = [self._to(out, by_token, node, line), lse]
        return new

    def _repeated(self, node: Node, heads: Node, count: int, axes: tuple[str, ...]) -> Node:
        """`heads` repeated to `count` by each rank, in a row; they become varying over those of
        `axes` over which every rank has them."""
        b, groups, *rest = heads.tensor.shape
        if groups == count:
            return heads
        layout = heads.placed
        same = [axis for axis in axes if layout.state(axis) == "replicated"]
        if heads.requires_grad and same:
            heads = self.emitter.reshard(heads, layout.add_varying(same), node.origin)
        single = self._added(node, aten.unsqueeze.default, (heads, 2), heads)
        repeated = (b, groups, count // groups, *rest)
        expanded = self._added(node, aten.expand.default, (single, repeated), heads)
        return self._added(node, aten.view.default, (expanded, (b, count, *rest)), heads)

    def _moved(self, node: Node, args: tuple[Arg, ...]) -> float:
        """The bytes that placing `node` on these arguments moves."""
        args, kwargs, proposals = self._arguments(node, args)
        return self.emitter.moved_bytes(node.op, args, kwargs, node.type, proposals)

    def _in_pieces(self, node: Node) -> Node | None:
        """Place an operator that would gather as the operators that it is made of."""
        if node.op not in DECOMPOSITIONS or self._moved(node, node.args) == 0.0:
            return None
        values = [self.mapping[n] for n in call_operands(node.args, node.kwargs)]
        operands = tuple(n.tensor for n in values)
        fragment = decompose(node.op, *slotted(node.args, node.kwargs), operands, node.type)
        results = [n for n in fragment.replay(values, partial(self._piece, node)) if n is not None]
        self.results[node] = results
        return results[0]

    def _piece(
        self,
        node: Node,
        _: int,
        call: FragmentCall,
        args: tuple[Arg, ...],
        kwargs: dict[str, Arg],
    ) -> Node:
        """Place one of the operators that `node` is made of."""
        if call.op == GETITEM:
            return self.emitter.item(args[0], args[1], node.origin)
        operands = list(nodes_in(args))
        types = call.type if isinstance(call.type, tuple) else (call.type,)
        return self.emitter.call(
            call.op,
            args,
            kwargs,
            origin=node.origin,
            type=call.type,
            proposals=self.sequences.proposals(operands),
            requires_grad=call.op != aten.detach.default
            and any(map(is_floating, types))
            and any(n.requires_grad for n in operands),
        )

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
        elif pin:
            self.emitter.explicit.add(new)
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
        if input_key(node if node.op == INPUT else node.args[0]) in self.draft.inputs:
            self.emitter.explicit.add(value)
        if len(self.users[node]) > 1:
            self.emitter.shared.add(value)
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
        self.sequences.consider(node)
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
        return self.emitter.reshard(value, layout, replace(node.origin, stage=stage))

    def _lengthened(self, value: Node, shape: tuple[int, ...]) -> Node:
        """`value` with the zeros that storage adds."""
        added = (size - own for size, own in zip(shape, value.tensor.shape, strict=True))
        # From the last dim to the first, how much is added before it and after it.
        pads = [each for more in reversed(list(added)) for each in (0, more)]
        args = (value, pads)
        return self.emitter.call(aten.constant_pad_nd.default, args, origin=value.origin)


def _single_heads(node: Node) -> tuple[Node, Node]:
    """The keys and values of attention as they are before a model repeats them."""
    k, v = node.args[1:3]
    keys, values = repeated_heads(k), repeated_heads(v)
    if keys is None or values is None or keys.tensor.shape[1] != values.tensor.shape[1]:
        return k, v
    return keys, values


def _bias_apart(node: Node) -> tuple[Op, tuple[Arg, ...], Node, int] | None:
    """The operator and arguments of a linear map without its bias, the bias, and the dim of the
    weight that is contracted."""
    if node.op == aten.addmm.default and not node.kwargs:
        bias, x, weight = node.args
        return aten.mm.default, (x, weight), bias, 0
    contracted = contracted_dim(node)
    if contracted is None or len(node.args) < 3:
        return None
    x, weight, bias, *rest = node.args
    if bias is None:
        return None
    return node.op, (x, weight, None, *rest) if rest else (x, weight), bias, contracted

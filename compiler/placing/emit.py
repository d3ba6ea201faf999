"""Emit placed nodes: each call is typed, placed by its rule, and its operands brought there.

Both the partitioner and the differentiator write their graphs through an `Emitter`, so forward and
backward obey the same rules and every change of layout is an explicit node.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import replace
from functools import partial

import torch

from meshwright.compiler.errors import PassError
from meshwright.compiler.graph.fragment import Fragment, FragmentCall
from meshwright.compiler.graph.ir import (
    GETITEM,
    INPUT,
    TRANSFER,
    Arg,
    Builder,
    MeshOp,
    Node,
    NodeType,
    Op,
    Origin,
    TensorType,
    map_nodes,
)
from meshwright.compiler.graph.slots import call_operands
from meshwright.compiler.layout.layout import Layout
from meshwright.compiler.layout.mesh import Mesh
from meshwright.compiler.layout.reshard import Collective, collectives
from meshwright.compiler.placing.fragments import Given, fragment_of, placements
from meshwright.compiler.placing.movement import Movement, Reason, stays_split
from meshwright.compiler.placing.result_types import result_type
from meshwright.compiler.placing.rules.factories import filled_with, is_filled
from meshwright.compiler.placing.rules.notation import Placement

FIRST_ONLY = {torch.ops.aten._native_batch_norm_legit_functional.default}
"""Operators of which only the first result is differentiable."""


class Emitter:
    """A builder that places what it emits."""

    def __init__(
        self,
        builder: Builder,
        *,
        backward: bool = False,
        written: Set[Node] = frozenset(),
        device: str = "cpu",
    ) -> None:
        self.builder, self.backward, self.device = builder, backward, device
        self.written = written
        """Values whose layout the plan wrote."""
        self.movements: list[Movement] = []
        self._have: dict[Node, dict[Layout, Node]] = {}
        self._items: dict[tuple[Node, int], Node] = {}
        self._rooted: dict[Node, bool] = {}

    @property
    def mesh(self) -> Mesh:
        return self.builder.mesh

    def call(
        self,
        op: Op,
        args: tuple[Arg, ...],
        kwargs: Mapping[str, Arg] | None = None,
        *,
        origin: Origin,
        type: NodeType = None,
        placement: Placement | None = None,
        why: Callable[[int, Collective], Reason] | None = None,
        requires_grad: bool = False,
        name: str = "",
    ) -> Node:
        """Emit `op` on these nodes, resharding operands as its `placement` asks, by default the
        cheapest.

        `why` gives the reason for a change of layout of an operand, by its place: by default, it is
        forced where another operand stays in the layout that the plan wrote.
        """
        kwargs = dict(sorted((kwargs or {}).items()))
        operands = call_operands(args, kwargs)
        if type is None:
            type = result_type(op, args, kwargs)
        if placement is None:
            placement = self._alone(op, args, kwargs, type)
        why = why or partial(self._reason, operands, placement)
        brought = (
            self.reshard(value, layout, origin, user=op, why=partial(why, place))
            for place, (value, layout) in enumerate(zip(operands, placement.operands, strict=True))
        )
        return self.builder.emit(
            op,
            map_nodes(args, lambda _: next(brought)),
            {key: map_nodes(value, lambda _: next(brought)) for key, value in kwargs.items()},
            type=type,
            layout=self._layout(placement, type),
            origin=origin,
            requires_grad=requires_grad,
            name=name,
        )

    def replay(
        self,
        fragment: Fragment,
        parameters: Sequence[Node],
        wanted: Sequence[Layout | None],
        origin: Origin,
    ) -> list[Node | None]:
        """Emit the calls of a fragment, placed together: as it is cheapest where its results are
        `wanted` in these layouts. Returns the results, in the layouts that they have."""
        chosen = iter(self._placements(fragment, parameters, tuple(wanted)))

        def emit(_: int, call: FragmentCall, args: tuple[Arg, ...], kwargs: dict[str, Arg]) -> Node:
            placement = next(chosen)
            if placement is None:
                return self.item(args[0], args[1], origin)
            return self.call(
                call.op, args, kwargs, origin=origin, type=call.type, placement=placement
            )

        return fragment.replay(parameters, emit)

    def _alone(
        self, op: Op, args: tuple[Arg, ...], kwargs: Mapping[str, Arg], type: NodeType
    ) -> Placement:
        """The cheapest placement of one call."""
        call = Node("", op, args, kwargs, type)
        (found,) = self._placements(*fragment_of([call], [call]), (None,))
        assert found is not None
        return found

    def _placements(
        self, fragment: Fragment, parameters: Sequence[Node], wanted: tuple[Layout | None, ...]
    ) -> tuple[Placement | None, ...]:
        given = tuple(map(self._given, parameters))
        return placements(fragment, given, wanted, self.mesh, self.device)

    def _given(self, value: Node) -> Given:
        filled = is_filled(value)
        return Given(
            value.tensor,
            value.placed,
            requires_grad=value.requires_grad and not self.backward,
            number=filled_with(value.op, value.args) if filled else None,
            elsewhere=frozenset(self._have.get(value, ())),
            written=value in self.written,
        )

    def item(self, source: Node, index: int, origin: Origin, *, name: str = "") -> Node:
        """One of the results of a node; emitted once."""
        if (source, index) not in self._items:
            assert isinstance(source.type, tuple) and isinstance(source.layout, tuple)
            self._items[source, index] = self.builder.emit(
                GETITEM,
                (source, index),
                type=source.type[index],
                layout=source.layout[index],
                origin=origin,
                requires_grad=source.requires_grad
                and is_floating(source.type[index])
                and not (index and source.op in FIRST_ONLY),
                name=name,
                phase=source.phase,
            )
        return self._items[source, index]

    def adopt(self, node: Node) -> None:
        """Take over a node that is already placed."""
        self.builder.adopt(node)
        self.is_rooted(node)  # in the order of the graph, so that it only looks one node back
        if node.op == GETITEM:
            self._items[node.args[0], node.args[1]] = node

    def reshard(
        self,
        value: Node,
        target: Layout,
        origin: Origin,
        *,
        user: Op = MeshOp("output"),
        why: Callable[[Collective], Reason] = lambda collective: Reason(),
        anew: bool = False,
    ) -> Node:
        """`value` in the layout `target`, by explicit collectives, each emitted once per value
        unless it is to be made `anew`.

        `why` gives the reason for a collective, which notes it.
        """
        target = target.canonical(self.mesh)
        known = {value.placed: value}
        have = known if anew else self._have.setdefault(value, known)
        if target in have:
            return have[target]
        if is_filled(value) and not target.partial and not target.varying:
            have[target] = self._filled(value, target)
            return have[target]
        counted = value.requires_grad and not self.backward
        node = value if counted else self._counted_once(value, target, origin)
        for collective in collectives(node.placed, target, self.mesh):
            if collective.target in have:
                node = have[collective.target]
                continue
            reason = why(collective)
            if self.mesh.sequential.issuperset(collective.axes):
                reason = replace(reason, forced=True)
            noted = replace(
                _reducing(value, origin), axis_lines=reason.lines, instead=reason.instead
            )
            following = self._emit_collective(node, collective, noted)
            self.movements.append(Movement(value, user, collective, following, reason))
            node = have[collective.target] = following
        return node

    def transfer(self, value: Node, origin: Origin, stage: int) -> Node:
        """`value` sent to another stage, in the layout that it has."""
        return self.builder.emit(
            TRANSFER,
            (value,),
            type=value.type,
            layout=value.placed,
            origin=replace(origin, stage=stage),
            requires_grad=value.requires_grad,
        )

    def _filled(self, value: Node, layout: Layout) -> Node:
        """A tensor of one number, made in the layout in which it is wanted."""
        return self.builder.emit(
            torch.ops.aten.full.default,
            (list(value.tensor.shape), filled_with(value.op, value.args)),
            {"dtype": value.tensor.dtype},
            type=value.type,
            layout=layout,
            origin=value.origin,
        )

    def _counted_once(self, value: Node, target: Layout, origin: Origin) -> Node:
        """`value` without the varying axes that `target` lacks.

        A backward is not differentiated again, so a value that varies there is simply replicated,
        as is one that has no gradient.
        """
        states = ("replicated", "partial")
        gone = tuple(axis for axis in value.placed.varying if target.state(axis) in states)
        if not gone:
            return value
        layout = value.placed.drop_varying(gone)
        have = self._have[value]
        if layout not in have:
            have[layout] = self._emit_collective(
                value, Collective("narrow", gone, value.placed, layout), origin
            )
        return have[layout]

    def _reason(
        self, operands: Sequence[Node], placement: Placement, place: int, collective: Collective
    ) -> Reason:
        forced = any(
            other is not operands[place]
            and other in self.written
            and stays_split(other.placed, layout, collective.axes)
            for other, layout in zip(operands, placement.operands, strict=True)
        )
        return Reason(forced)

    def _emit_collective(self, value: Node, collective: Collective, origin: Origin) -> Node:
        return self.builder.emit(
            MeshOp(collective.kind),
            (value,),
            {"axes": collective.axes},
            type=value.type,
            layout=collective.target,
            origin=origin,
            requires_grad=value.requires_grad,
        )

    def is_rooted(self, value: Node) -> bool:
        """Whether a value is computed from parameters, buffers and constants alone."""
        if value not in self._rooted:
            self._rooted[value] = (
                value.of_model if value.op == INPUT else all(map(self.is_rooted, value.operands()))
            )
        return self._rooted[value]

    def _layout(self, placement: Placement, type: NodeType) -> Layout | tuple[Layout | None, ...]:
        layouts = tuple(
            None if layout is None else layout.canonical(self.mesh) for layout in placement.results
        )
        if isinstance(type, tuple):
            return layouts
        if layouts[0] is None:
            raise PassError("a rule gave no layout for a tensor result", help="report this")
        return layouts[0]


def _reducing(value: Node, origin: Origin) -> Origin:
    """The origin of a change of layout: a pending sum is reduced for the module that left it, any
    other value is moved for the module that wants it."""
    if not value.placed.partial:
        return origin
    own = value.origin
    return replace(
        origin,
        module=own.module,
        module_type=own.module_type,
        modules=own.modules,
        source=own.source,
    )


def is_floating(type: NodeType) -> bool:
    """Whether a value of this type can carry a gradient."""
    return isinstance(type, TensorType) and type.differentiable

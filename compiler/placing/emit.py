"""Emit placed nodes: each call is typed, placed by its rule, and its operands brought there.

Both the partitioner and the differentiator write their graphs through an `Emitter`, so forward and
backward obey the same rules and every change of layout is an explicit node.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from meshwright.compiler.errors import PassError
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
from meshwright.compiler.graph.weights import input_behind
from meshwright.compiler.layout.collectives import COLLECTIVES
from meshwright.compiler.layout.layout import Layout
from meshwright.compiler.layout.mesh import Mesh
from meshwright.compiler.layout.reshard import Collective, collectives, cost
from meshwright.compiler.placing.calls import make_call
from meshwright.compiler.placing.engine import operand_cost, place
from meshwright.compiler.placing.result_types import result_type
from meshwright.compiler.placing.rules.factories import filled_with, makes_zeros
from meshwright.compiler.placing.rules.notation import Call, Operand, Placement

FIRST_ONLY = {torch.ops.aten._native_batch_norm_legit_functional.default}
"""Operators of which only the first result is differentiable."""


@dataclass(frozen=True, slots=True)
class Movement:
    """A change of layout that was inserted, and the call that asked for it."""

    value: Node
    user: Op
    collective: Collective
    node: Node
    forced: bool
    """Whether the plan left no other choice: it wrote the layout of another operand, which stays as
    it is, splits the sequence that this moves, or cuts the batch into microbatches that this takes
    together."""

    @property
    def implicit(self) -> bool:
        """Whether it or its adjoint gathers, and nothing that the plan wrote made that the only
        way."""
        kind = self.collective.row
        slices = not kind.moves and COLLECTIVES[kind.adjoint].gathers
        gathers = kind.moves and kind.source == "split"
        return not self.forced and (gathers or (slices and self.gathers_back))

    @property
    def gathers_back(self) -> bool:
        """Whether this slice has an adjoint, which gathers.

        A parameter's does not count: its gradient is gathered however its work is split.
        """
        return self.value.requires_grad and input_behind(self.value) is None

    def sent_bytes(self, mesh: Mesh) -> int:
        """The bytes sent per rank for it and, where it is differentiated, its adjoint."""
        size = self.value.tensor.dtype.itemsize
        collective, differentiated = self.collective, self.value.requires_grad
        return math.ceil(cost(collective.source, collective.target, size, mesh, differentiated))


class Emitter:
    """A builder that places what it emits."""

    def __init__(self, builder: Builder, *, backward: bool = False) -> None:
        self.builder, self.backward = builder, backward
        self.explicit: set[Node] = set()
        self.planned: Callable[[Node, Collective], bool] = lambda value, collective: False
        """Whether the plan asks for this change of a value's layout, as for sequences."""
        self.shared: set[Node] = set()
        """Values with multiple users: a pending sum is reduced once for all of them."""
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
        proposals: Mapping[Node, Layout] | None = None,
        wanted: tuple[Layout, ...] = (),
        requires_grad: bool = False,
        free: bool = False,
        name: str = "",
    ) -> Node:
        """Emit `op` on these nodes, resharding operands as its cheapest placement asks.

        `free` says that what it moves would move in any case.
        """
        kwargs = dict(sorted((kwargs or {}).items()))
        operands = call_operands(args, kwargs)
        if type is None:
            type = result_type(op, args, kwargs)
        asked = self._ask(op, args, kwargs, type, proposals, wanted)
        placement = place(asked)
        kept = self._kept(operands, placement)
        brought = (
            self.reshard(
                value, layout, origin, user=op, forced=None if free else _others(kept, value)
            )
            for value, layout in zip(operands, placement.operands, strict=True)
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

    def moved_bytes(
        self,
        op: Op,
        args: tuple[Arg, ...],
        kwargs: Mapping[str, Arg],
        type: NodeType,
        proposals: Mapping[Node, Layout] | None = None,
    ) -> float:
        """The bytes that the cheapest placement of a call moves, adjoint included."""
        asked = self._ask(op, args, kwargs, type, proposals)
        placed = place(asked).operands
        pairs = zip(asked.operands, placed, strict=True)
        return sum(operand_cost(operand, layout, self.mesh) for operand, layout in pairs)

    def _ask(
        self,
        op: Op,
        args: tuple[Arg, ...],
        kwargs: Mapping[str, Arg],
        type: NodeType,
        proposals: Mapping[Node, Layout] | None = None,
        wanted: tuple[Layout, ...] = (),
    ) -> Call:
        def operand(node: Node) -> Operand:
            return self._operand(node, proposals or {})

        return make_call(op, args, kwargs, type, self.mesh, operand, wanted)

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
        forced: frozenset[str] | None = None,
        anew: bool = False,
    ) -> Node:
        """`value` in the layout `target`, by explicit collectives, each emitted once per value
        unless it is to be made `anew`.

        `forced` are the axes over which the plan left no choice; by default every one.
        """
        target = target.canonical(self.mesh)
        known = {value.placed: value}
        have = known if anew else self._have.setdefault(value, known)
        if target in have:
            return have[target]
        if is_filled(value) and not target.partial and not target.varying:
            have[target] = self._filled(value, target)
            return have[target]
        node = self._counted_once(value, target, origin) if self.backward else value
        for collective in collectives(node.placed, target, self.mesh):
            if collective.target in have:
                node = have[collective.target]
                continue
            following = self._emit_collective(node, collective, _reducing(value, origin))
            planned = (
                forced is None
                or bool(forced & set(collective.axes))
                or self.planned(value, collective)
                or self.mesh.sequential.issuperset(collective.axes)  # nothing moves
            )
            self.movements.append(Movement(value, user, collective, following, planned))
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

        A backward is not differentiated again, so a value that varies there is simply replicated.
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

    def _kept(self, operands: Sequence[Node], placement: Placement) -> dict[Node, frozenset[str]]:
        """The operands that the plan laid out, and the axes over which they stay split so."""
        return {
            value: frozenset(
                axis
                for axis in value.placed.split_axes
                if layout.split_dim(axis) == value.placed.split_dim(axis)
            )
            for value, layout in zip(operands, placement.operands, strict=True)
            if value in self.explicit
        }

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

    def _operand(self, value: Node, proposals: Mapping[Node, Layout]) -> Operand:
        return Operand(
            value.tensor,
            value.placed,
            differentiable=value.requires_grad and not self.backward,
            explicit=value in self.explicit,
            available=frozenset(self._have.get(value, ())),
            proposals=(proposals[value],) if value in proposals else (),
            keep_partial=value not in self.shared,
            zero=makes_zeros(value.op, value.args),
            rooted=input_behind(value) is None and self.is_rooted(value),
            filled=is_filled(value),
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


def _others(kept: Mapping[Node, frozenset[str]], value: Node) -> frozenset[str]:
    """The axes over which `value` has to yield, since other operands keep what the plan wrote."""
    return frozenset().union(*(axes for node, axes in kept.items() if node is not value))


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


def is_filled(value: Node) -> bool:
    """Whether all elements of a value are one number and no cotangent will reach it."""
    return not value.requires_grad and filled_with(value.op, value.args) is not None


def is_floating(type: NodeType) -> bool:
    """Whether a value of this type can carry a gradient."""
    return isinstance(type, TensorType) and type.differentiable

"""Choose the layouts of a draft: state what the plan pins and asks for, and solve.

Some operators can be written in more than one way: in pieces, or with heads repeated. The graph is
first solved as it is. Where a choice moves the operands of such operators, it is solved once more
with these in the other way, which stays where it costs less.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial

import torch

from meshwright.compiler.composites.experts import Combine
from meshwright.compiler.graph.ir import GETITEM, INPUT, Node, OutputKind
from meshwright.compiler.graph.slots import call_operands
from meshwright.compiler.layout.factors import dim_axes
from meshwright.compiler.layout.layout import Layout, replicated
from meshwright.compiler.layout.mesh import Mesh
from meshwright.compiler.layout.reshard import Collective
from meshwright.compiler.placing.candidates import Candidates, Unplaceable, allowed_on
from meshwright.compiler.placing.choose import Choice, Contradiction, choose
from meshwright.compiler.placing.movement import gathers, stays_split
from meshwright.compiler.placing.rules.notation import Placement
from meshwright.dsl.statements import Allow, Experts
from meshwright.passes.placing.heads import Repeat, repeat_heads
from meshwright.passes.placing.moves import MOVED, Marked, mark
from meshwright.passes.placing.pieces import has_pieces, in_pieces
from meshwright.passes.placing.written import written
from meshwright.passes.statements.draft import Draft, device_type, input_key
from meshwright.passes.statements.pins import pin_lines
from meshwright.passes.statements.sequences.attention import (
    ATTENTION,
    HEADS,
    check_heads,
    repeats,
    uneven_heads,
)
from meshwright.passes.statements.targets import modules_of

aten = torch.ops.aten


def lay_out(draft: Draft) -> Layouts:
    """The layouts of what `draft` computes."""
    found = Layouts(mark(draft))
    for node in found.marked.graph.nodes:
        if node.op in ATTENTION:
            found.check_heads(node, found.choice.given(node.args[0]))
    return found.with_repeated_heads().with_pieces()


@dataclass(frozen=True)
class Layouts:
    """A graph that is not placed, with marks, and the choice of its placements."""

    marked: Marked

    @property
    def draft(self) -> Draft:
        """The draft that they are of."""
        return self.marked.draft

    @property
    def mesh(self) -> Mesh:
        """Its mesh."""
        return self.marked.draft.mesh

    @cached_property
    def choice(self) -> Choice:
        """The cheapest placements."""
        try:
            return self._chosen()
        except Unplaceable as error:
            if error.node.op in ATTENTION:
                self.check_heads(error.node, error.layouts[0])
            raise
        except Contradiction as error:
            error.culprit = ", ".join(dict.fromkeys(filter(None, map(self._lines, error.nodes))))
            raise

    def _lines(self, node: Node) -> str:
        """The lines of the plan behind what is asked of a node and its operands."""
        moves = (self.marked.move(each) for each in (node, *node.operands()))
        pins = (
            self.draft.inputs.get(input_key(each))
            for each in (node, *node.operands())
            if each.op == INPUT
        )
        found = (*(move.line for move in moves if move), *(pin_lines(pin) for pin in pins if pin))
        return ", ".join(dict.fromkeys(filter(None, found)))

    def _chosen(self) -> Choice:
        graph = self.marked.graph
        found = Candidates(
            graph,
            self.mesh,
            {x: self.written.get(x, replicated(x.tensor.shape)) for x in graph.inputs},
            {node: move.layout for node in graph.nodes if (move := self.marked.move(node))},
            frozenset(self.written),
            self._offered,
        )
        ends = {
            output.node: [replicated(output.node.tensor.shape)]
            for output in graph.outputs
            if output.kind is not OutputKind.BUFFER
        }
        unasked = partial(self._unasked, found)
        return choose(found, ends, unasked, device_type(self.draft), self._asking.__getitem__)

    def check_heads(self, node: Node, q: Layout) -> None:
        """Refuse a ring over axes that split heads, in queries laid out as `q`."""
        old = self.marked.old[node]
        statement = self.marked.contexts.statement_of(old)
        if statement is not None and statement.method != "ulysses":
            check_heads(self.draft, old, q, statement)

    @cached_property
    def written(self) -> dict[Node, Layout]:
        """The layouts that the plan wrote for inputs and their views."""
        return written(self.draft, self.marked.graph)

    @cached_property
    def _users(self) -> Mapping[Node, list[Node]]:
        return self.marked.graph.users()

    @cached_property
    def _allowed(self) -> set[str]:
        """The modules in which the plan lets values be gathered."""
        return set(self.draft.plan.resolve(Allow, ["", *modules_of(self.draft)]))

    @cached_property
    def _exchanged(self) -> set[str]:
        return {axis for each in self.draft.plan.of(Experts) for axis in each.over}

    def _offered(self, user: Node, layout: Layout) -> Iterator[Layout]:
        """Further layouts that a user may want of an operand."""
        self.marked.sequences.consider(self.marked.old[user])
        return self.marked.sequences.offered(layout)

    def asks(self, user: Node, placement: Placement, place: int, collective: Collective) -> bool:
        """Whether the plan asks for a change of layout of an operand of a call, by its place, or
        left no other choice."""
        value = call_operands(user.args, user.kwargs)[place]
        self.marked.sequences.consider(self.marked.old[user])
        return self.marked.sequences.moves(value, collective) or self._leaves_no_choice(
            user, placement, place, collective
        )

    def _leaves_no_choice(
        self, user: Node, placement: Placement, place: int, collective: Collective
    ) -> bool:
        axes, operands = collective.axes, call_operands(user.args, user.kwargs)
        value = operands[place]
        if user.op == aten.slice.Tensor and not self._users[user]:
            # A result is made whole anyway: cutting its padding off costs no gather of its own.
            return True
        if user.op == Combine.op and value is user.args[0] and self._exchanged.issuperset(axes):
            return True
        return any(
            other is not value
            and (written := self.written.get(other)) is not None
            and stays_split(written, layout, axes)
            for other, layout in zip(operands, placement.operands, strict=True)
        )

    def _unasked(
        self,
        found: Candidates,
        user: Node,
        place: int,
        placement: Placement,
        collective: Collective,
    ) -> bool:
        """Whether a change of layout of an operand of a call is one that the plan does not ask for:
        a gather, or one whose adjoint gathers; or what a sequence that is split can do without, as
        reducing a sum whole."""
        value = call_operands(user.args, user.kwargs)[place]
        reduced = collective.kind == "all_reduce"
        if user.op == MOVED or not (reduced or gathers(collective, value)):
            return False
        # Equal layers ask the same.
        key = self._asking[user], place, placement, collective
        if key not in self._answers:
            self._answers[key] = self._answer(user, place, placement, collective)
        answer = self._answers[key]
        if answer is None:
            return not self._is_needed_whole(value, collective.axes, found)
        return answer

    @cached_property
    def _answers(self) -> dict[object, bool | None]:
        return {}

    @cached_property
    def _asking(self) -> dict[Node, object]:
        """What a call's answers depend on, besides placements."""
        return {
            node: (
                node.op,
                self.marked.sequences.flows(self.marked.old[node]),
                self._allowed.isdisjoint(path for path, _ in node.origin.modules),
                bool(self._users[node]),
                tuple((x.tensor.shape, self.written.get(x), operands.index(x)) for x in operands),
            )
            for node in self.marked.graph.nodes
            if node.op != GETITEM
            for operands in [call_operands(node.args, node.kwargs)]
        }

    def _answer(
        self, user: Node, place: int, placement: Placement, collective: Collective
    ) -> bool | None:
        """Whether the plan should ask for a change of layout; None where that depends on the other
        users of a sequence."""
        value, sequences = call_operands(user.args, user.kwargs)[place], self.marked.sequences
        sequences.consider(self.marked.old[user])
        if collective.kind == "all_reduce":
            return any(sequences.offered(collective.source))
        if not self.mesh.sequential.isdisjoint(collective.axes):
            # What depends on parameters is not whole before the loop has ended.
            return True
        if not self._allowed.isdisjoint(path for path, _ in user.origin.modules):
            return False
        if sequences.moves(value, collective):
            return None
        return not self._leaves_no_choice(user, placement, place, collective)

    def _is_needed_whole(self, value: Node, axes: tuple[str, ...], found: Candidates) -> bool:
        """Whether any user can't run where a value is split over any of the axes."""
        return any(
            not any(
                each.operands[place].split_dim(axis) is not None
                for each in found.of[user]
                for axis in axes
            )
            for user in self._users[value]
            if user in found.of
            for place, own in enumerate(call_operands(user.args, user.kwargs))
            if own is value
        )

    def with_repeated_heads(self) -> Layouts:
        """With keys and values repeated where attention has fewer heads of them than ranks."""
        needed, wanted = dict[Node, Repeat](), dict[Node, Repeat]()
        for node in self.marked.graph.nodes:
            if node.op in ATTENTION:
                by_head = self._repeat_by_head(node)
                repeat = by_head or self._repeat(node)
                if repeat is not None:
                    (needed if by_head else wanted)[node] = repeat
        if needed:
            return Layouts(repeat_heads(self.marked, needed | wanted))
        if not wanted:
            return self
        return min(self, Layouts(repeat_heads(self.marked, wanted)), key=_cost)

    def _repeat_by_head(self, node: Node) -> Repeat | None:
        """How attention needs its keys repeated that a statement splits by head."""
        statement = self.marked.by_head(node)
        if statement is None:
            return None
        q, k = (each.args[0] for each in node.args[:2])
        given = self.choice.given(q)
        layout = self.marked.contexts.split(given, HEADS, statement.over)
        if layout is None:
            raise uneven_heads(self.draft, self.marked.old[node], given, statement)
        axes, groups = dim_axes(layout.dims[HEADS]), k.tensor.shape[HEADS]
        count = groups * repeats(groups, self.mesh.size(axes))
        return Repeat(count, axes) if count != groups else None

    def _repeat(self, node: Node) -> Repeat | None:
        """How attention could have its keys repeated, for which they are moved."""
        q, k, v = node.args[:3]
        count, axes = q.tensor.shape[HEADS], dim_axes(self.choice.given(q).dims[HEADS])
        held = [self.choice.given(x).state(axis) for x in (k, v) for axis in axes]
        alike = bool(axes) and set(held) == {"replicated"}
        fewer = k.tensor.shape[HEADS] != count and self.choice.moves(node)
        return Repeat(count, axes) if alike and fewer else None

    def with_pieces(self) -> Layouts:
        """With operators in pieces that would have to be given operands in other layouts."""
        choice = self.choice
        those = {node for node in self.marked.graph.nodes if has_pieces(node)}
        if not any(map(choice.moves, those)) and not (those and _cost(self)[0]):
            return self
        marked, mapping = in_pieces(self.marked, those)
        apart = Layouts(marked)
        if _cost(apart) >= _cost(self):
            return self
        whole = {node for node in those if apart._runs_whole(node, mapping)}
        if not whole:
            return apart
        return min(apart, Layouts(in_pieces(self.marked, those - whole)[0]), key=_cost)

    def _runs_whole(self, node: Node, mapping: Mapping[Node, Node]) -> bool:
        """Whether a node that is here in pieces runs on the layouts that its operands have."""
        operands = call_operands(node.args, node.kwargs)
        given = tuple(self.choice.given(mapping[n]).drop_varying() for n in operands)
        return any(each.operands == given for each in allowed_on(node, given, self.mesh))


def _cost(layouts: Layouts) -> tuple[float, float]:
    cost = layouts.choice.solution.cost
    return cost.real, cost.imag

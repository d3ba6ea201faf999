"""The placements that each call of a graph may have.

Layouts flow from inputs to their users, as each rule allows, and back from what users want: what is
made of parameters and constants alone (positions, masks) is whole on the way there, and may be
split as those that it meets are. A value has the layouts that its call's placements give; a change
of layout leads from any of them to what a user needs.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from meshwright.compiler.errors import LayoutError
from meshwright.compiler.graph.ir import GETITEM, INPUT, Graph, Node
from meshwright.compiler.graph.slots import call_operands
from meshwright.compiler.layout.layout import Layout
from meshwright.compiler.layout.mesh import Mesh
from meshwright.compiler.placing.allowed import allowed, ignored
from meshwright.compiler.placing.calls import make_call
from meshwright.compiler.placing.rules.factories import makes_zeros
from meshwright.compiler.placing.rules.notation import Call, Operand, Placement

Options = tuple[Placement, ...]


class Unplaceable(LayoutError):
    """No rule lets `node` run on operands in `layouts` or what they can be brought to."""

    def __init__(self, node: Node, layouts: tuple[Layout, ...]) -> None:
        self.node, self.layouts = node, layouts
        super().__init__(
            f"`{node.op}` cannot run on operands laid out as "
            + ", ".join(map("`{}`".format, layouts)),
            help="give one of them another layout with `shard`",
        )


@dataclass
class Candidates:
    """`of` has the placements of each call, inputs included; `layouts` those of each value.

    `fixed` are the layouts of inputs. A node in `moved` stands for a value that the plan wants in
    another layout: by that of the value. `kept` are values whose splits the plan wrote: no call may
    undo one where it can do otherwise.
    """

    graph: Graph
    mesh: Mesh
    fixed: Mapping[Node, Layout]
    moved: Mapping[Node, Callable[[Layout], Layout]] = field(default_factory=dict)
    kept: frozenset[Node] = frozenset()
    offered: Callable[[Node, Layout], Iterable[Layout]] = lambda user, layout: ()
    """Further layouts that a user may want of an operand, for one that this has."""
    elsewhere: Mapping[Node, frozenset[Layout]] = field(default_factory=dict)
    """Layouts that inputs are there in besides."""
    of: dict[Node, Options] = field(default_factory=dict, init=False)
    ignored: dict[Node, frozenset[int]] = field(default_factory=dict, init=False)
    """The operands that a call takes in whatever layout they have, by place."""
    kinds: dict[Node, int] = field(default_factory=dict, init=False)
    """A number for each call: calls of one number are alike, placements included."""
    layouts: dict[Node, tuple[Layout, ...]] = field(default_factory=dict, init=False)
    wanted: dict[Node, dict[Layout, None]] = field(default_factory=dict, init=False)
    gathered: dict[Node, dict[Layout, None]] = field(default_factory=dict, init=False)
    """Layouts of values that are gathered for a user, each rank's use of which counts separately:
    what is gathered once can serve all."""
    _calls: dict[Node, Call] = field(default_factory=dict, init=False)
    _needs: dict[Options, list[_Needed]] = field(default_factory=dict, init=False)
    """By placements of a call: what they need of each operand."""

    def __post_init__(self) -> None:
        for node in self.graph.nodes:
            self._place(node)
        again = False
        for node in reversed(self.graph.nodes):
            again |= self._want(node)
        if again:
            for node in self.graph.nodes:
                self._place(node)
        known: dict[Hashable, int] = {}
        for node, options in self.of.items():
            key = node.op, self._calls.get(node, node.type), options
            self.kinds[node] = known.setdefault(key, len(known))

    def _place(self, node: Node) -> None:
        """Work out the placements of a node on those of its operands."""
        if node.op == GETITEM:
            source, index = node.args
            found: Iterable[Layout | None] = (each.results[index] for each in self.of[source])
            self.layouts[node] = tuple(dict.fromkeys(filter(None, found)))
            return
        self.of[node] = self._options(node)
        if not isinstance(node.type, tuple):
            self.layouts[node] = tuple(
                dict.fromkeys(each.results[0] for each in self.of[node] if each.results[0])
            )

    def _options(self, node: Node) -> Options:
        if node.op == INPUT:
            return (Placement((), (self.fixed[node].canonical(self.mesh),)),)
        operands = tuple(call_operands(node.args, node.kwargs))
        if node in self.moved:
            moved = (
                self.moved[node](each).canonical(self.mesh) for each in self.layouts[operands[0]]
            )
            return tuple(Placement((each,), (each,)) for each in dict.fromkeys(moved))
        call = make_call(
            *(node.op, node.args, node.kwargs, node.type, self.mesh),
            lambda each: _operand(each, self._given(each, node)),
            tuple(self.wanted.get(node, ())),
        )
        self._calls[node], self.ignored[node] = call, ignored(call)
        found = allowed(call)
        if not found:
            raise Unplaceable(node, tuple(each.layout for each in call.operands))
        kept = [i for i, each in enumerate(operands) if each in self.kept]
        if not kept:
            return found
        written = [self.layouts[operands[i]][0] for i in kept]
        keeping = tuple(
            each
            for each in found
            if not any(
                _loses_split(w, each.operands[i]) for w, i in zip(written, kept, strict=True)
            )
        )
        return keeping or found

    def _given(self, value: Node, user: Node) -> tuple[Layout, ...]:
        """The layouts that a user may find a value in."""
        own = self.layouts[value]
        more = (each for layout in own for each in self.offered(user, layout))
        return tuple(dict.fromkeys((*own, *more, *self.gathered.get(value, ()))))

    def _want(self, node: Node) -> bool:
        """Note the layouts that a node's placements need of its operands; returns whether any of
        these may have one that it had not."""
        if node.op in (INPUT, GETITEM):
            return False
        if node in self.wanted and node not in self.moved:
            self.of[node] = self._options(node)
        new = False
        operands = tuple(call_operands(node.args, node.kwargs))
        options = self.of[node]
        if options not in self._needs:
            self._needs[options] = _needed(options)
        for operand, needed in zip(operands, self._needs[options], strict=True):
            own = self.layouts[operand]
            for asked in needed.varying:
                known = self.gathered.get(operand, {})
                if asked not in known and any(_gathers(each, asked) for each in own):
                    self.gathered.setdefault(operand, {})[asked] = None
                    new = True
            if operand.op in (INPUT, GETITEM) or not needed.splits:
                continue
            splits = {each.drop_states() for each in own}
            for asked in needed.splits:
                if asked not in splits:
                    self.wanted.setdefault(operand, {})[asked] = None
                    new = True
        return new


def allowed_on(node: Node, given: tuple[Layout, ...], mesh: Mesh) -> Options:
    """The placements that the rule of a call allows on operands in these layouts."""
    layouts = iter(given)

    def operand(each: Node) -> Operand:
        return _operand(each, (next(layouts),))

    return allowed(make_call(node.op, node.args, node.kwargs, node.type, mesh, operand))


def _operand(node: Node, layouts: tuple[Layout, ...]) -> Operand:
    return Operand(
        node.tensor,
        layouts[0],
        node.requires_grad,
        makes_zeros(node.op, node.args),
        layouts[1:],
    )


@dataclass(frozen=True, slots=True)
class _Needed:
    """Of the layouts that placements need of an operand: those that split something, without their
    states, and those that vary."""

    splits: tuple[Layout, ...]
    varying: tuple[Layout, ...]


def _needed(options: Options) -> list[_Needed]:
    found = []
    for column in zip(*(each.operands for each in options), strict=True):
        layouts = dict.fromkeys(column)
        splits = dict.fromkeys(each.drop_states() for each in layouts if each.split_axes)
        found.append(_Needed(tuple(splits), tuple(each for each in layouts if each.varying)))
    return found


@lru_cache(maxsize=65536)
def _gathers(given: Layout, needed: Layout) -> bool:
    """Whether one layout splits an axis over which the other varies."""
    return not set(given.split_axes).isdisjoint(needed.varying)


@lru_cache(maxsize=65536)
def _loses_split(written: Layout, used: Layout) -> bool:
    """Whether a split that the plan wrote is undone or moved; splitting further is not that."""
    return any(written.split_dim(axis) != used.split_dim(axis) for axis in written.split_axes)

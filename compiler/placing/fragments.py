"""Place the calls of a fragment together: those of one backward, or a single one.

What they take is placed, and what they give may be wanted in given layouts. Equal fragments, as in
the layers of a model, are placed once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from meshwright.compiler.graph.fragment import Fragment, FragmentCall
from meshwright.compiler.graph.ir import (
    INPUT,
    Arg,
    Builder,
    Graph,
    InputKind,
    MeshOp,
    Node,
    TensorType,
    map_nodes,
)
from meshwright.compiler.graph.slots import Slot, call_operands, freeze
from meshwright.compiler.layout.layout import Layout
from meshwright.compiler.layout.mesh import Mesh
from meshwright.compiler.placing.candidates import Candidates
from meshwright.compiler.placing.choose import choose
from meshwright.compiler.placing.rules.notation import Placement

END = MeshOp("end")
"""Stands for a result in the layout in which it is wanted."""


@dataclass(frozen=True, slots=True)
class Given:
    """A value that a fragment takes."""

    type: TensorType
    layout: Layout
    requires_grad: bool = False
    """Whether the adjoint of what is done with it counts."""
    number: float | None = None
    """What all of its elements are, where it can be made in any layout."""
    elsewhere: frozenset[Layout] = frozenset()
    """The layouts that it is there in besides."""
    written: bool = False
    """Whether the plan wrote its layout: its splits stay where they can."""


def fragment_of(
    calls: Sequence[Node], results: Sequence[Node | None]
) -> tuple[Fragment, tuple[Node, ...]]:
    """Those of `calls`, which are not placed, that the results need, and the values they take."""
    needed = {node for node in results if node is not None}
    for node in reversed(calls):
        if node in needed:
            needed.update(node.operands())
    calls = [node for node in calls if node in needed]
    needed.difference_update(calls)
    operands = (n for node in calls for n in call_operands(node.args, node.kwargs))
    taken = dict.fromkeys(n for n in (*operands, *results) if n is not None and n in needed)
    slots = {node: Slot(i) for i, node in enumerate((*taken, *calls))}
    found = tuple(_slotted(node, slots.__getitem__) for node in calls)
    asked = tuple(None if node is None else slots[node].index for node in results)
    return Fragment(found, asked), tuple(taken)


def _slotted(node: Node, slot: Callable[[Node], Slot]) -> FragmentCall:
    kwargs = ((key, freeze(map_nodes(node.kwargs[key], slot))) for key in sorted(node.kwargs))
    return FragmentCall(node.op, freeze(map_nodes(node.args, slot)), tuple(kwargs), node.type)


@lru_cache(maxsize=65536)
def placements(
    fragment: Fragment,
    given: tuple[Given, ...],
    wanted: tuple[Layout | None, ...],
    mesh: Mesh,
    device: str,
) -> tuple[Placement | None, ...]:
    """The cheapest placements of the calls of a fragment, together with bringing its results to
    the layouts that are `wanted` of them; None for what takes apart the results of a call.

    Raises `LayoutError` where there are none.
    """
    sketch = _Sketch(fragment, given, wanted, mesh)
    chosen = choose(sketch.candidates(), device=device).placements
    return tuple(chosen.get(node) for node in sketch.calls)


class _Sketch:
    """A fragment as a graph, with stand-ins for what it takes and gives."""

    def __init__(
        self,
        fragment: Fragment,
        given: Iterable[Given],
        wanted: Iterable[Layout | None],
        mesh: Mesh,
    ) -> None:
        self.builder = Builder("fragment", mesh)
        self.given = {self._value(each): each for each in given}
        self.calls: list[Node] = []
        results = fragment.replay(self.given, self._call)
        self.ends = {
            self.builder.emit(END, (result,), type=result.type): layout
            for result, layout in zip(results, wanted, strict=True)
            if result is not None and layout is not None
        }

    def candidates(self) -> Candidates:
        builder, given = self.builder, self.given
        return Candidates(
            Graph(builder.name, builder.mesh, tuple(builder.nodes), ()),
            builder.mesh,
            {node: each.layout for node, each in given.items()},
            {end: _always(layout) for end, layout in self.ends.items()},
            frozenset(node for node, each in given.items() if each.written),
            elsewhere={node: each.elsewhere for node, each in given.items()},
        )

    def _value(self, given: Given) -> Node:
        """What stands for a value that is given."""
        if given.number is not None:
            args = list(given.type.shape), given.number
            return self.builder.emit(torch.ops.aten.full.default, args, type=given.type)
        return self.builder.emit(
            INPUT,
            (InputKind.ARGUMENT, ""),
            type=given.type,
            requires_grad=given.requires_grad,
        )

    def _call(
        self, _: int, call: FragmentCall, args: tuple[Arg, ...], kwargs: dict[str, Arg]
    ) -> Node:
        self.calls.append(self.builder.emit(call.op, args, kwargs, type=call.type))
        return self.calls[-1]


def _always(layout: Layout) -> Callable[[Layout], Layout]:
    return lambda _: layout

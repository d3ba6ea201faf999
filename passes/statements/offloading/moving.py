"""Moves between the device and other places, as nodes of a graph, and where they can begin."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TypeVar

from meshwright.compiler.graph.ir import (
    INPUT,
    SAVED,
    TO_DISK,
    TO_HOST,
    Builder,
    Graph,
    Node,
    Op,
    Origin,
)
from meshwright.compiler.program import Place

T = TypeVar("T")
_LAYERS = 8
"""How many layers a model without lists of modules is taken to have."""


class Uses:
    """Where a graph computes, and first takes what is saved for it.

    `places` are those of all but inputs and saved values, and `first` says which of them takes a
    saved value first. `layer` is how many of them a layer has on average: a member of a list, if
    the model has lists.
    """

    def __init__(self, graph: Graph) -> None:
        self.places: list[int] = []
        self.first: dict[Node, int] = {}
        layers: Counter[str] = Counter()
        for place, node in enumerate(graph.nodes):
            if node.op in (INPUT, SAVED):
                continue
            for operand in node.operands():
                self.first.setdefault(operand, len(self.places))
            self.places.append(place)
            listed = (path for path, _ in node.origin.modules if is_listed(path))
            layers[next(listed, "")] += 1
        others = layers.pop("", 0)
        count = len(layers) or _LAYERS
        self.layer = -(-(layers.total() or others) // count)


def by_place(found: Iterable[tuple[int, T]]) -> dict[int, list[T]]:
    """What is to happen at each place of a graph, in the order in which it is found."""
    by_place: dict[int, list[T]] = {}
    for place, each in found:
        by_place.setdefault(place, []).append(each)
    return by_place


def leave(builder: Builder, value: Node, stands: Node, place: Place, origin: Origin) -> Node:
    """Begin to bring a value, for which a node of the new graph stands, to a place."""
    return builder.emit(
        TO_HOST if place.path is None else TO_DISK,
        (stands,),
        {} if place.path is None else {"path": place.path},
        type=value.type,
        layout=value.layout,
        origin=origin,
        name=f"{value.name}_to_{place.to}",
    )


def emit(
    builder: Builder, op: Op, operand: Node | int, name: str, *, like: Node | None = None
) -> Node:
    """A node with one operand, of the type and the layout of `like` and from its place in the
    model; by default, of the operand's."""
    like = like if like is not None else operand  # type: ignore[assignment]
    assert like is not None
    return builder.emit(
        op, (operand,), type=like.type, layout=like.layout, origin=like.origin, name=name
    )


def is_listed(path: str) -> bool:
    """Whether a module is a member of a list."""
    return path.rpartition(".")[2].isdigit()

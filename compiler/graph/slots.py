"""Calls without their operands: what is the same for a hundred equal layers, and can be hashed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, TypeAlias

from meshwright.compiler.graph.ir import Arg, Node, map_nodes, nodes_in

Frozen: TypeAlias = "tuple[tuple[Arg, ...], tuple[tuple[str, Arg], ...]]"
"""The arguments of a call, hashable: those given by place, and pairs of name and value."""


@dataclass(frozen=True, slots=True)
class Slot:
    """Stands for the tensor operand of this number in the arguments of a call."""

    index: int


def call_operands(args: tuple[Arg, ...], kwargs: Mapping[str, Arg]) -> list[Node]:
    """The nodes among the arguments of a call, in the order of their slots."""
    return [*nodes_in(tuple(args)), *(n for key in sorted(kwargs) for n in nodes_in(kwargs[key]))]


def slotted(args: tuple[Arg, ...], kwargs: Mapping[str, Arg]) -> Frozen:
    """The arguments of a call with a `Slot` for each operand, in the order of `call_operands`."""
    numbers = count()

    def slot(_: Node) -> Slot:
        return Slot(next(numbers))

    given = freeze(map_nodes(args, slot))
    return given, tuple((key, freeze(map_nodes(kwargs[key], slot))) for key in sorted(kwargs))


def freeze(arg: Arg) -> Arg:
    """The same argument with tuples for lists, so that it can be hashed."""
    if isinstance(arg, (list, tuple)):
        return tuple(freeze(item) for item in arg)
    return arg


def filled(
    arg: Arg, values: Sequence[Any], sequence: type[list[Any]] | type[tuple[Any, ...]] = list
) -> Arg:
    """The argument with the value of each slot in its place, and lists as torch's operators take
    them, or tuples as our own do."""
    if isinstance(arg, Slot):
        return values[arg.index]
    if not isinstance(arg, tuple):
        return arg
    return sequence(filled(item, values, sequence) for item in arg)

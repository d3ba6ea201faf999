"""Calls of operators as the rule engine sees them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from meshwright.compiler.graph.ir import Arg, Node, NodeType, Op, map_nodes, nodes_in
from meshwright.compiler.graph.types import freeze
from meshwright.compiler.layout.layout import Layout
from meshwright.compiler.layout.mesh import Mesh
from meshwright.compiler.placing.rules.notation import Call, Operand, Slot


def call_operands(args: Iterable[Arg], kwargs: Mapping[str, Arg]) -> list[Node]:
    """The nodes among the arguments of a call, in the order in which a rule lists them."""
    return [*nodes_in(tuple(args)), *(n for key in sorted(kwargs) for n in nodes_in(kwargs[key]))]


def make_call(
    op: Op,
    args: tuple[Arg, ...],
    kwargs: Mapping[str, Arg],
    type: NodeType,
    mesh: Mesh,
    operand: Callable[[Node], Operand],
    wanted: tuple[Layout, ...] = (),
) -> Call:
    """The call of `op` on these nodes, each seen as `operand` says; see `Call.wanted`."""
    numbers = iter(range(len(call_operands(args, kwargs))))
    slotted = freeze(map_nodes(args, lambda _: Slot(next(numbers))))
    named = tuple(
        (key, freeze(map_nodes(kwargs[key], lambda _: Slot(next(numbers)))))
        for key in sorted(kwargs)
    )
    results = type if isinstance(type, tuple) else (type,)
    operands = tuple(operand(node) for node in call_operands(args, kwargs))
    return Call(op, slotted, named, operands, results, mesh, wanted)

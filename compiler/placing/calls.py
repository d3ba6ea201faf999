"""Calls of operators as the rule engine sees them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from meshwright.compiler.graph.ir import Arg, Node, NodeType, Op
from meshwright.compiler.graph.slots import call_operands, slotted
from meshwright.compiler.layout.layout import Layout
from meshwright.compiler.layout.mesh import Mesh
from meshwright.compiler.placing.rules.notation import Call, Operand


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
    given, named = slotted(args, kwargs)
    results = type if isinstance(type, tuple) else (type,)
    operands = tuple(operand(node) for node in call_operands(args, kwargs))
    return Call(op, given, named, operands, results, mesh, wanted)

"""Replace operators whose operands would have to move by those that they are made of.

Before:  lstm_cell: f32[8, 16] = lstm_cell(x, hx, w_ih, w_hh)
After:   linear: f32[8, 64]  = linear(x, w_ih)
         ...

Requires: a graph that is not placed. Ensures: the same values.
"""

from __future__ import annotations

from collections.abc import Container

import torch

from meshwright.compiler.autodiff.decompositions import DECOMPOSITIONS, decompose
from meshwright.compiler.graph.fragment import FragmentCall
from meshwright.compiler.graph.ir import GETITEM, Arg, Builder, Node, nodes_in
from meshwright.compiler.graph.slots import call_operands, slotted
from meshwright.compiler.placing.emit import is_floating
from meshwright.passes.placing.moves import Marked

aten = torch.ops.aten


def in_pieces(marked: Marked, which: Container[Node]) -> tuple[Marked, dict[Node, Node]]:
    """With the operators of these nodes decomposed; and what stands for each node, the first of its
    results where there are several."""
    results: dict[Node, list[Node]] = {}

    def replaced(builder: Builder, node: Node, mapping: dict[Node, Node]) -> Node | None:
        if node.op == GETITEM and node.args[0] in results:
            return results[node.args[0]][node.args[1]]
        if node not in which:
            return None
        results[node] = _decomposed(builder, node, mapping)
        return results[node][0]

    return marked.rewritten(replaced)


def has_pieces(node: Node) -> bool:
    """Whether a node's operator is known to be made of others."""
    return node.op in DECOMPOSITIONS


def _decomposed(builder: Builder, node: Node, mapping: dict[Node, Node]) -> list[Node]:
    values = [mapping[n] for n in call_operands(node.args, node.kwargs)]
    operands = tuple(n.tensor for n in values)
    fragment = decompose(node.op, *slotted(node.args, node.kwargs), operands, node.type)

    def piece(_: int, call: FragmentCall, args: tuple[Arg, ...], kwargs: dict[str, Arg]) -> Node:
        types = call.type if isinstance(call.type, tuple) else (call.type,)
        return builder.emit(
            call.op,
            args,
            kwargs,
            type=call.type,
            origin=node.origin,
            requires_grad=call.op != aten.detach.default
            and any(map(is_floating, types))
            and any(n.requires_grad for n in nodes_in(args)),
        )

    return [n for n in fragment.replay(values, piece) if n is not None]

"""Mark what computes in a type that the model has chosen.

    y = x.float()            # chosen: `precision bf16` leaves it in single precision,
    z = y.softmax(-1)        # and what computes on it alone
    return z.to(x.dtype)

Functionalising leaves out a cast that changes nothing in the types of the example, and so does
simplifying. So this is noted before, on the nodes themselves.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from meshwright.compiler.capture.simplify import names_dtype
from meshwright.compiler.capture.tracing.modes import is_off
from meshwright.compiler.graph.aliasing import is_view
from meshwright.compiler.placing.rules.pointwise import is_pointwise

_EXACT = "meshwright exact"


def mark_exact(graph: fx.Graph) -> None:
    """Mark the nodes of an exported graph that compute in a type that the model names."""
    chosen: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "call_function" and _is_exact(node, chosen):
            # Torch copies `custom` to what it makes of a node; nodes of one region share it.
            node.meta["custom"] = {**node.meta.get("custom", {}), _EXACT: True}


def is_exact(node: fx.Node) -> bool:
    """Whether the model says in which type a node of a marked graph computes."""
    return _EXACT in node.meta.get("custom", {})


def _is_exact(node: fx.Node, chosen: set[fx.Node]) -> bool:
    """Whether a node computes on what is `chosen`; adds what the model casts, and views of that."""
    op: Any = node.target
    operands = [n for n in node.all_input_nodes if _is_floating(n)]
    given = [n in chosen for n in operands]
    named = names_dtype(op, node.args, node.kwargs) and _is_floating(node)
    ours = isinstance(op, torch._ops.OpOverload)
    seen = op is operator.getitem or (ours and is_view(op))
    if operands and (named or (all(given) and seen)):
        chosen.add(node)
    if not ours or node in chosen:
        return False
    return (any if is_pointwise(op) else all)(given or [False]) or is_off(node)


def _is_floating(node: fx.Node) -> bool:
    """Whether a node gives a tensor of floating-point numbers, or multiple."""
    value = node.meta.get("val")
    (first, *_) = value if isinstance(value, (tuple, list)) and value else (value,)
    return isinstance(first, Tensor) and first.is_floating_point()

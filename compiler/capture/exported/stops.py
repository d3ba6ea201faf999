"""Make explicit where gradients stop, as autograd itself saw it while the model was traced.

Before:  k = mul(h, 2)              ran under `no_grad`: autograd recorded nothing
         y = mul(h, k)
After:   k = mul(h, 2)
         k_stop = detach(k)
         y = mul(h, k_stop)

Every traced value says whether it had a history. Where a graph would give it one all the same
(`no_grad`, `inference_mode`, operators that are not differentiable), the uses that are
differentiated take it from a `detach`. `detach` stays in a captured graph: it is a stop-gradient.
What is written in place gains and loses its history on the way: see `written.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from meshwright.compiler.capture.exported.history import History
from meshwright.compiler.capture.exported.writes import writes
from meshwright.compiler.capture.exported.written import Written, is_floating

_DETACH = torch.ops.aten.detach.default


def stop_gradients(graph: fx.Graph, stopped: set[fx.Node]) -> None:
    """Put a `detach` behind each value whose gradient autograd would not have followed, in place.

    `stopped` are the nodes that ran under `no_grad`; of views made there autograd itself says
    that they have a history, and follows none.
    """
    written = None
    if any(writes(node) for node in graph.nodes):
        written = Written(graph, History(graph, stopped), stopped)
    followed: set[fx.Node] = set()
    for node in list(graph.nodes):
        if node.op == "placeholder":
            fed = has_history(node)
        else:
            fed = any(operand in followed for operand in node.all_input_nodes)
        inside = written is not None and node in written
        if not (fed or inside) or node.op == "output":
            continue
        followed.add(node)
        if not inside and is_floating(node) and (node in stopped or not has_history(node)):
            _stop(graph, node, stopped)
    if written:
        written.stop_gradients()


def _stop(graph: fx.Graph, node: fx.Node, stopped: set[fx.Node]) -> None:
    """Detach `node` for the users that have a history; the others cannot pass a gradient on."""
    users = [
        user
        for user in node.users
        if user.op == "output" or writes(user) or (user not in stopped and _may_follow(user))
    ]
    if users:
        with graph.inserting_after(node):
            stop = graph.call_function(_DETACH, (node,))
        stop.meta = dict(node.meta)
        for user in users:
            user.replace_input_with(node, stop)


def _may_follow(node: fx.Node) -> bool:
    """Whether a gradient might pass through: of a node with multiple results nothing is known."""
    return has_history(node) or not isinstance(node.meta.get("val"), Tensor)


def has_history(node: fx.Node) -> bool:
    """Whether autograd recorded how this value came about while the model was traced."""
    meta: Any = node.meta.get("tensor_meta")
    if meta is None:
        value = node.meta.get("val")
        return isinstance(value, Tensor) and value.requires_grad
    parts = meta if type(meta) in (tuple, list) else (meta,)
    return any(getattr(part, "requires_grad", False) for part in parts)

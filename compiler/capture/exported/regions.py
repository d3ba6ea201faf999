"""Inline the bodies of `no_grad` regions, and remember which nodes were in them.

Before:  c, s = wrap_with_set_grad_enabled(False, body, x)
After:   c, s = <body of x>, and the nodes of body are among those returned

Export keeps such a region as a nested graph; functionalising would inline it and forget that.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from meshwright.compiler.capture.origin import origin_of
from meshwright.compiler.errors import CaptureError

_GRAD = torch.ops.higher_order.wrap_with_set_grad_enabled


def inline_regions(module: fx.GraphModule) -> set[fx.Node]:
    """Inline every region of `module`, in place; returns the nodes that ran without gradients."""
    inliner = _Inliner(module.graph)
    regions = [node for node in module.graph.nodes if is_region(node)]
    for node in regions:
        inliner.replace(module, node)
    if regions:
        for node in module.graph.find_nodes(op="get_attr"):
            if not node.users:
                module.graph.erase_node(node)
        module.recompile()
    return inliner.stopped


class _Inliner:
    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.stopped: set[fx.Node] = set()

    def replace(self, owner: fx.GraphModule, node: fx.Node) -> None:
        """Put the results of a top-level region in the places of its `getitem`s."""
        with self.graph.inserting_before(node):
            results = self.region(owner, node, operands_of(node))
        for user in list(node.users):
            index: Any = user.args[1]
            user.replace_all_uses_with(results[index])
            self.graph.erase_node(user)
        self.graph.erase_node(node)

    def region(self, owner: fx.GraphModule, node: fx.Node, operands: list[Any]) -> list[Any]:
        """The results of one region called with `operands`."""
        body: fx.GraphModule = getattr(owner, str(_body(node).target))
        if node.target is not _GRAD:
            _refuse_control_flow(node, body)
        enabled = bool(node.args[0])
        given = iter(operands)
        new: dict[fx.Node, Any] = {}
        for inner in body.graph.nodes:
            if inner.op == "placeholder":
                new[inner] = next(given)
            elif inner.op == "output":
                return list(_mapped(inner.args[0], new))
            elif inner.op != "get_attr":
                new[inner] = self.call(body, inner, new, enabled)
        raise AssertionError("a graph without an output")

    def call(
        self, body: fx.GraphModule, node: fx.Node, new: dict[fx.Node, Any], enabled: bool
    ) -> Any:
        if is_region(node):
            return self.region(body, node, [_mapped(operand, new) for operand in operands_of(node)])
        source = node.args[0] if node.args else None
        if node.target is operator.getitem and isinstance(source, fx.Node):
            results = new[source]
            if isinstance(results, list):
                return results[node.args[1]]  # type: ignore[index]  # of a region's results
        copy = self.graph.node_copy(node, new.__getitem__)
        if not enabled:
            self.stopped.add(copy)
        return copy


def is_region(node: fx.Node) -> bool:
    return node.op == "call_function" and isinstance(node.target, torch._ops.HigherOrderOperator)


def operands_of(node: fx.Node) -> list[Any]:
    """The values that a region is called with."""
    return list(node.args[node.args.index(_body(node)) + 1 :])


def _body(node: fx.Node) -> fx.Node:
    return next(a for a in node.args if isinstance(a, fx.Node) and a.op == "get_attr")


def _mapped(value: Any, new: dict[fx.Node, Any]) -> Any:
    return fx.node.map_arg(value, new.__getitem__)


def _refuse_control_flow(node: fx.Node, body: fx.GraphModule) -> None:
    lines = [origin_of(inner).source for inner in (node, *body.graph.nodes)]
    raise CaptureError(
        f"`{node.target}` would be control flow in the graph",
        code="control flow",
        culprit=next(filter(None, lines), ""),
        help="write it with torch.where, or decide it in Python before the step",
    )

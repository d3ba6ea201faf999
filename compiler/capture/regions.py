"""Put the bodies of `no_grad` regions back in line, with their stop-gradients made explicit.

Before:  c, s = wrap_with_set_grad_enabled(False, body, x)
After:   c0, s0 = <body of x>
         c = detach(c0)
         s = detach(s0)

Export keeps such a region as a nested graph; functionalising inlines it and forgets what it was.
An `enable_grad` inside a `no_grad` sees detached what the outer region made, and its own
results are differentiable again, as in eager mode.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from meshwright.compiler.capture.origin import origin_of
from meshwright.compiler.errors import CaptureError

_GRAD = torch.ops.higher_order.wrap_with_set_grad_enabled
_AUTOCAST = torch._higher_order_ops.wrap.wrap_with_autocast


def inline_regions(module: fx.GraphModule) -> set[fx.Node]:
    """Inline every region of `module`, in place; returns the nodes that ran without gradients."""
    inliner = _Inliner(module.graph)
    for node in list(module.graph.nodes):
        if node.op == "call_function" and isinstance(node.target, torch._ops.HigherOrderOperator):
            inliner.replace(module, node)
    if inliner.found:
        module.graph.eliminate_dead_code(lambda node: node.op != "get_attr")
        module.recompile()
    return inliner.stopped


class _Inliner:
    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.stopped: set[fx.Node] = set()
        self.found = False

    def replace(self, owner: fx.GraphModule, node: fx.Node) -> None:
        """Put the results of a top-level region in the places of its `getitem`s."""
        self.found = True
        with self.graph.inserting_before(node):
            results = self.region(owner, node, list(map_operands(node)), enabled=True)
        for user in list(node.users):
            assert user.target.__name__ == "getitem", user  # type: ignore[union-attr]  # a builtin
            index: Any = user.args[1]
            user.replace_all_uses_with(results[index])
            self.graph.erase_node(user)
        self.graph.erase_node(node)

    def region(
        self, owner: fx.GraphModule, node: fx.Node, operands: list[Any], *, enabled: bool
    ) -> list[Any]:
        """Inline one region called with `operands`; `enabled` says what surrounds it."""
        inner = enabled
        if node.target is _GRAD:
            inner = bool(node.args[0])
        elif node.target is _AUTOCAST:
            _refuse_autocast(node)
        else:
            raise CaptureError(
                f"`{node.target}` is control flow in the graph, which cannot be compiled",
                code="control flow",
                culprit=origin_of(node).source,
                help="write it with torch.where or a plain Python condition",
            )
        body = getattr(owner, str(_body(node).target))
        crossing = inner != enabled
        if crossing and inner:
            operands = [self.detached(operand) for operand in operands]
        results = self.body(body, operands, enabled=inner)
        return [self.detached(r) for r in results] if crossing and enabled else results

    def body(self, body: fx.GraphModule, operands: list[Any], *, enabled: bool) -> list[Any]:
        given = iter(operands)
        new: dict[fx.Node, Any] = {}
        for node in body.graph.nodes:
            if node.op == "placeholder":
                new[node] = next(given)
            elif node.op == "output":
                outputs = fx.node.map_arg(node.args[0], new.__getitem__)
                return list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]
            elif node.op == "get_attr":
                continue
            elif isinstance(node.target, torch._ops.HigherOrderOperator):
                operands = [new[operand] for operand in map_operands(node)]
                new[node] = self.region(body, node, operands, enabled=enabled)
            elif node.target.__name__ == "getitem" and isinstance(new[node.args[0]], list):
                new[node] = new[node.args[0]][node.args[1]]
            else:
                new[node] = self.graph.node_copy(node, new.__getitem__)
                if not enabled:
                    self.stopped.add(new[node])
        raise AssertionError("a graph without an output")

    def detached(self, value: Any) -> Any:
        """`value` behind a stop-gradient if it was made without gradients and could have one."""
        if value not in self.stopped or not is_floating(value):
            return value
        new = self.graph.call_function(torch.ops.aten.detach.default, (value,))
        new.meta = dict(value.meta)
        return new


def map_operands(node: fx.Node) -> tuple[Any, ...]:
    """The values that a region is called with."""
    place = node.args.index(_body(node))
    return tuple(node.args[place + 1 :])


def is_floating(node: Any) -> bool:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())


def _body(node: fx.Node) -> fx.Node:
    return next(a for a in node.args if isinstance(a, fx.Node) and a.op == "get_attr")


def _refuse_autocast(node: fx.Node) -> None:
    device, dtype, enabled = node.args[:3]
    if enabled:
        raise CaptureError(
            f"the forward opens `torch.autocast({device!r}, {dtype})`",
            code="autocast",
            culprit=origin_of(node).source,
            help="remove it, and ask for mixed precision in the plan: `precision bf16`",
        )

"""Where autograd's history reaches, at each point of a graph that writes in place.

A write changes what autograd knows of a value, of its views and of what it is a view of, so that
one node can have no history for its first user and one for its second. Nothing in an exported graph
says so. The graph is run again on stand-ins, and autograd itself is asked before every node.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import detect_fake_mode

from meshwright.compiler.capture.exported.writes import writes, written_operands

Memory = frozenset[int]


class History:
    """What autograd knows of each node, and in `reaches` of each use of one node by another.

    `memory` is the storages that a value lies in. `families[node]` is the value that it shares its
    history with: itself, or what it is a view of. A `detach` begins a family in the same memory.
    """

    def __init__(self, graph: fx.Graph, stopped: set[fx.Node]) -> None:
        self.memory: dict[fx.Node, Memory] = {}
        self.families: dict[fx.Node, fx.Node] = {}
        self.reaches: dict[tuple[fx.Node, fx.Node], bool] = {}
        """By user and operand: whether a gradient of this use would arrive at a parameter."""
        self.follows: dict[fx.Node, bool] = {}
        """Whether a gradient of this value, just after its node ran, would arrive anywhere."""
        self.held: dict[fx.Node, set[fx.Node]] = {}
        """By write: the families that had a history in the memory that it is about to change."""
        self._values: dict[fx.Node, Any] = {}
        self._inside: defaultdict[int, list[fx.Node]] = defaultdict(list)
        self._known: dict[Any, bool] = {}
        mode = detect_fake_mode([node.meta.get("val") for node in graph.nodes])
        assert mode is not None
        with mode:
            for node in graph.nodes:
                self._run(node, node in stopped)

    def _run(self, node: fx.Node, stopped: bool) -> None:
        if node.op == "placeholder":
            self._values[node] = _like(node)
        for operand in node.all_input_nodes:
            self.reaches[node, operand] = self._reaches(self._values[operand])
        if node.op == "call_function":
            if writes(node):
                self.held[node] = self._holders(written_operands(node))
            with torch.set_grad_enabled(not stopped):
                target: Any = node.target
                self._values[node] = target(
                    *fx.node.map_arg(node.args, self._values.__getitem__),
                    **fx.node.map_arg(node.kwargs, self._values.__getitem__),
                )
        if node in self._values:
            self.memory[node] = _memory(self._values[node])
            for memory in self.memory[node]:
                self._inside[memory].append(node)
            self.families[node] = self._family(node)
            self.follows[node] = self._reaches(self._values[node])

    def _holders(self, operands: list[fx.Node]) -> set[fx.Node]:
        inside = {node for operand in operands for node in self.sharing(operand)}
        families = {self.families[node] for node in inside}
        return {family for family in families if self._reaches(self._values[family])}

    def sharing(self, node: fx.Node) -> list[fx.Node]:
        """The nodes that share memory with this one, itself included, in the graph's order."""
        (memory,) = self.memory[node]
        return self._inside[memory]

    def _family(self, node: fx.Node) -> fx.Node:
        if node.target is torch.ops.aten.detach.default:
            return node
        if node.target is operator.getitem and self._is_fresh(node.all_input_nodes[0]):
            return node
        for operand in written_operands(node) if writes(node) else node.all_input_nodes:
            if self.memory[node] & self.memory[operand]:
                return self.families[operand]
        return node

    def _is_fresh(self, node: fx.Node) -> bool:
        return self.families[node] is node and node.target is not torch.ops.aten.detach.default

    def _reaches(self, value: Any) -> bool:
        if isinstance(value, (tuple, list)):
            return any(self._reaches(item) for item in value)
        if not isinstance(value, Tensor):
            return False
        try:
            behind = value.grad_fn
        except RuntimeError:
            # Made under `no_grad`, and its base was written since: no use of it has a gradient.
            return False
        if behind is None:
            # A view that was made under `no_grad` says that it requires a gradient and has none.
            return value.requires_grad and not value._is_view()
        return self._arrives(behind)

    def _arrives(self, start: Any) -> bool:
        """Whether a leaf is behind this node of autograd's graph."""
        stack = [start]
        while stack:
            step = stack[-1]
            behind = [after for after, _ in step.next_functions if after is not None]
            unknown = [after for after in behind if after not in self._known]
            if unknown and step not in self._known:
                stack += unknown
                continue
            self._known[step] = hasattr(step, "variable") or any(self._known[b] for b in behind)
            stack.pop()
        return self._known[start]


def _like(node: fx.Node) -> Any:
    """A new leaf, or what a placeholder that is not a tensor stands for."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return value
    fresh = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
    recorded: Any = node.meta.get("tensor_meta")
    wanted = value.requires_grad if recorded is None else recorded.requires_grad
    return fresh.requires_grad_(wanted)


def _memory(value: Any) -> Memory:
    if isinstance(value, Tensor) and value.layout is torch.strided:
        return frozenset((value.untyped_storage()._cdata,))
    if isinstance(value, (tuple, list)):
        return frozenset().union(*(_memory(item) for item in value))
    return frozenset()

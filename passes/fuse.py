"""Send the small weights of a block together, and their gradients.

Before:  all_gather_replicated: f32[64, 16] = all_gather_replicated(layers_0_weight, dp)
         all_gather_replicated_1: f32[64]   = all_gather_replicated(layers_0_bias, dp)
After:   together: (f32[64, 16], f32[64])   = all_gather_replicated(layers_0_weight,
             layers_0_bias, dp)
         all_gather_replicated: f32[64, 16] = together[0]
         all_gather_replicated_1: f32[64]   = together[1]

A message costs its latency however few bytes it has, so what is small travels with what the same
block needs: gathers of its weights when the first of them is wanted, scatters of its gradients when
the last of them is there. Sending together costs a copy on both ends, which large tensors are not
worth: they travel alone.
Requires: graphs that run. Ensures: the same values.
Elsewhere: the flat buffers of FSDP and ZeRO, DDP's buckets.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TypeAlias

import torch

from meshwright.compiler.costs.prices import SMALL_BYTES
from meshwright.compiler.graph.aliasing import node_bytes
from meshwright.compiler.graph.ir import GETITEM, Builder, Graph, MeshOp, Node, Origin
from meshwright.compiler.graph.transfers import collective_kind, combines, transfers_of
from meshwright.compiler.placing.frame import BUCKET, BUCKET_ITEM
from meshwright.passes.statements.draft import Draft

REDUCTIONS = (MeshOp("reduce_scatter"), MeshOp("scatter_panels"), MeshOp("all_reduce"))
_CASTS = (torch.ops.aten._to_copy.default, MeshOp("vary"))
"""What may be between a weight and its gather, besides nothing."""
_KEPT = (BUCKET, BUCKET_ITEM, torch.ops.aten._to_copy.default)
MOST_BYTES = 1 << 22
"""The size at which what travels together is full."""


def fuse(draft: Draft) -> Draft:
    """`draft` with the small transfers of each graph sent together, block by block."""
    stages = tuple(
        replace(stage, graphs={phase: _fused(each) for phase, each in stage.graphs.items()})
        for stage in draft.stages
    )
    return replace(draft, stages=stages)


def _fused(graph: Graph) -> Graph:
    fuser = _Fuser(graph)
    return fuser.run() if fuser.gathers or fuser.scatters else graph


_Group: TypeAlias = "tuple[Node, ...]"


class _Fuser:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.builder = Builder(graph.name, graph.mesh)
        self.mapping: dict[Node, Node] = {}
        self.gathers = self._groups(filter(_gathers_weight, graph.nodes))
        self.scatters = self._groups(self._last_reductions())

    def _last_reductions(self) -> list[Node]:
        """The reductions over ranks after which gradients are only brought to where they are kept,
        or to a later graph; whole buckets are large enough alone."""
        users, results = self.graph.users(), {each.node for each in self.graph.results}
        ends, found = set[Node](), list[Node]()
        for node in reversed(self.graph.nodes):
            if node in results or not ends.issuperset(users[node]):
                continue
            sent = node.op in REDUCTIONS and not combines(node, self.graph.mesh)
            if sent and node.args[0].op != BUCKET:
                found.append(node)
            elif node.op in _KEPT or collective_kind(node.op) is not None:
                ends.add(node)
        return found[::-1]

    def _groups(self, found: Iterable[Node]) -> list[_Group]:
        """What travels together: small, in order, of one block, kind, reduction and type."""
        open_groups: dict[object, list[Node]] = {}
        groups: list[list[Node]] = []
        for node in found:
            block = _block(node.origin)
            (transfer,) = transfers_of(node, self.graph.mesh)
            if block is None or transfer.wire is None or self._bytes(node) > SMALL_BYTES:
                continue
            key = (block.module, node.op, transfer.wire, node.tensor.dtype)
            group = open_groups.get(key, [])
            if not group or sum(map(self._bytes, group)) > MOST_BYTES:
                group = open_groups[key] = []
                groups.append(group)
            group.append(node)
        return [tuple(group) for group in groups if len(group) > 1]

    def _bytes(self, node: Node) -> int:
        """What a rank holds of the operand of a collective."""
        return node_bytes(node.args[0], self.graph)

    def run(self) -> Graph:
        first = {group[0]: group for group in self.gathers}
        last = {group[-1]: group for group in self.scatters}
        fused = {node for group in (*self.gathers, *self.scatters) for node in group}
        behind = {node for group in self.scatters for node in group}
        later: list[Node] = []
        sent: list[tuple[_Group, Node]] = []
        for node in self.graph.nodes:
            if node in first:
                self._take(first[node], self._send(first[node]))
            elif node in last:
                sent.append((last[node], self._send(last[node])))
            elif behind.intersection(node.operands()):
                behind.add(node)
                later.append(node)
            elif node not in fused and node not in self.mapping:
                self.mapping[node] = self.builder.copy(node, self.mapping)
        # Nothing waits for what leads gradients to where they are kept.
        for group, together in sent:
            self._take(group, together)
        for node in later:
            self.mapping[node] = self.builder.copy(node, self.mapping)
        outputs = (each.of(self.mapping[each.node]) for each in self.graph.outputs)
        return self.builder.graph(outputs)

    def _send(self, group: _Group) -> Node:
        node, types = group[0], tuple(each.tensor for each in group)
        block = _block(node.origin)
        assert block is not None
        lines = (line for each in group for line in each.origin.plan_line.split(", ") if line)
        for each in group:
            if each.args[0] not in self.mapping:  # a cast of what is held, or what varies
                self.mapping[each.args[0]] = self.builder.copy(each.args[0], self.mapping)
        return self.builder.emit(
            node.op,
            tuple(self.mapping[each.args[0]] for each in group),
            node.kwargs,
            type=types,
            layout=tuple(each.placed for each in group),
            origin=replace(block, plan_line=", ".join(dict.fromkeys(lines))),
            name="together",
            phase=node.phase,
        )

    def _take(self, group: _Group, together: Node) -> None:
        for i, node in enumerate(group):
            self.mapping[node] = self.builder.emit(
                GETITEM,
                (together, i),
                type=node.type,
                layout=node.layout,
                origin=node.origin,
                name=node.name,
                phase=node.phase,
            )


def _gathers_weight(node: Node) -> bool:
    kind = collective_kind(node.op)
    if kind is None or not kind.gathers:
        return False
    source: Node = node.args[0]
    return (source.args[0] if source.op in _CASTS else source).held


def _block(origin: Origin) -> Origin | None:
    """The outermost layer of a list of layers around a node, as an origin; none outside of any."""
    for depth, (path, kind) in enumerate(origin.modules):
        if path.rpartition(".")[2].isdigit():
            modules = origin.modules[: depth + 1]
            return Origin(path, kind, modules=modules)
    return None

"""What an operator and a collective take on a cluster, in seconds: the one cost function.

An operator takes as long as its operations or its bytes, whichever is more; a collective takes the
latency of the slowest link that its groups span, and what a rank sends over that link's bandwidth.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from meshwright.compiler.costs.cluster import Cluster, ClusterError, Link
from meshwright.compiler.costs.volume import bytes_sent
from meshwright.compiler.graph.aliasing import IDENTITIES, is_view, local_bytes
from meshwright.compiler.graph.flops import flops
from meshwright.compiler.graph.ir import GETITEM, Node
from meshwright.compiler.graph.transfers import transfers_of
from meshwright.compiler.layout.mesh import Mesh

SMALL_BYTES = 1 << 18
"""The most bytes of a rank that are small: alone, latency is much of what they take, so that others
are sent with them. In the time of its latency a link sends 90 KB to 3.6 MB, by the clusters that
come with the package."""
Lane = Literal["node", "network", "host"]
"""A link of a rank, which carries one message after another."""


def sent_bytes(node: Node, mesh: Mesh, convention: str = "pipelined") -> int:
    """The bytes that a rank sends for a collective."""
    wires = (each.wire for each in transfers_of(node, mesh))
    return sum(
        bytes_sent(wire, _numel(source, mesh), source.tensor.dtype.itemsize, mesh, convention)
        for source, wire in zip(node.args, wires, strict=True)
        if wire is not None
    )


def _numel(node: Node, mesh: Mesh) -> int:
    return math.prod(node.placed.local_shape(mesh))


@dataclass(frozen=True)
class Prices:
    """What a cluster's devices and links take for the nodes of a mesh, under a convention of how
    much collectives send."""

    cluster: Cluster
    mesh: Mesh
    convention: str = "pipelined"
    _lanes: dict[tuple[str, ...], Lane] = field(default_factory=dict, init=False, repr=False)

    def operator(self, node: Node) -> float:
        """An operator on one rank: nothing where it is a view."""
        if node.op in IDENTITIES or node.op == GETITEM or is_view(node.op):
            return 0.0
        operands = dict.fromkeys(node.operands())
        size = sum(local_bytes(each, self.mesh) for each in (*operands, node))
        count = flops(node, self.mesh)
        computing = count / self.cluster.rate(_dtype((*operands, node))) if count else 0.0
        return self.cluster.overhead + max(computing, size / self.cluster.bandwidth)

    def copy(self, node: Node) -> float:
        """Reading and writing a value once."""
        return self.cluster.overhead + 2 * local_bytes(node, self.mesh) / self.cluster.bandwidth

    def collective(self, node: Node) -> float:
        """A collective, from its start to its end."""
        size = sent_bytes(node, self.mesh, self.convention)
        return self.link(node.kwargs["axes"]).seconds(size)

    def link(self, axes: Iterable[str]) -> Link:
        """The link that collectives over `axes` take."""
        found = self.cluster.network if self.lane(axes) == "network" else self.cluster.node
        assert found is not None
        return found

    def lane(self, axes: Iterable[str]) -> Lane:
        """Its name."""
        key = tuple(axis for axis in axes if axis not in self.mesh.sequential)
        if key not in self._lanes:
            between = self.cluster.spans_nodes(key, self.mesh)
            self.cluster.link(key, self.mesh)  # raises where there is none
            self._lanes[key] = "network" if between else "node"
        return self._lanes[key]

    def move(self, node: Node) -> float:
        """Bringing a value to the host, to a file or back."""
        if self.cluster.host is None:
            raise ClusterError(
                f"the plan moves values off the device, and `{self.cluster.name}` has no link to "
                "its host",
                help="add `[host]` with its `latency` and `bandwidth`",
            )
        return self.cluster.host.seconds(local_bytes(node, self.mesh))


def _dtype(nodes: Iterable[Node]) -> str:
    """The element type that a product of these computes in: that of its first operand."""
    types = (type for node in nodes for type, _ in node.results if type is not None)
    return str(next(type.dtype for type in types if type.differentiable)).removeprefix("torch.")

"""What a change of layout costs, and what a call does on each rank.

What is sent decides: the bytes of a rank, more for a slower link. Latencies and computing decide
between what sends as much: in nanoseconds, of which a second is worth a byte. So a choice is the
same for a small model as for a large one, and sends no more than it has to. A call takes as long as
its floating-point operations or the bytes that it reads and writes, whichever is more. Costs are
whole numbers, so that equal sums are equal.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import lru_cache

from meshwright.compiler.costs.cluster import Cluster, Link
from meshwright.compiler.graph.flops import flops
from meshwright.compiler.graph.ir import GETITEM, INPUT, Node, map_nodes
from meshwright.compiler.graph.slots import call_operands
from meshwright.compiler.layout.layout import Layout
from meshwright.compiler.layout.mesh import Mesh
from meshwright.compiler.layout.reshard import Collective, collectives, elements_sent
from meshwright.compiler.placing.rules.notation import Placement

_SECOND = 10**9
"""In the unit of times; and what a byte counts."""
DEFAULTS = {"cpu": "laptop", "cuda": "8xh100"}
"""The cluster that stands for all with devices of a type, where a plan names none. Any other type
counts as an accelerator."""


def sent_more(cost: complex) -> int:
    """The bytes of the fastest link in a difference of costs."""
    return int(cost.imag) // _SECOND


@lru_cache(maxsize=64)
def pricing(mesh: Mesh, device: str) -> Pricing:
    """The prices on ranks of a mesh whose devices are of a type."""
    return Pricing(mesh, device)


class Pricing:
    """The prices on ranks of a mesh whose devices are of a type."""

    def __init__(self, mesh: Mesh, device: str) -> None:
        self.mesh = mesh
        self.cluster = Cluster.load(DEFAULTS.get(device, DEFAULTS["cuda"]))
        self._links: dict[tuple[str, ...], Link] = {}

    def moved(
        self, given: Layout, wanted: Layout, itemsize: int, differentiated: bool, *, act: int = 1
    ) -> int:
        """Bringing a value from one layout to another, and its cotangent back; `act` is what that
        costs along a loop.

        Raises `LayoutError` where no collectives lead there.
        """
        found = 0
        for axes, elements in _sent(given, wanted, self.mesh, differentiated):
            if self.mesh.sequential.issuperset(axes):
                # Nothing is sent, and yet it is better not to.
                found += act
                continue
            link = self._link(axes)
            slowness = self.cluster.node.bandwidth / link.bandwidth
            found += _SECOND * round(elements * itemsize * slowness)
            found += round(_SECOND * link.latency)
        return found

    def bytes_in_latency(self, axes: Iterable[str]) -> float:
        """The bytes by which a sum over `axes` could be larger in the time of one message."""
        axes = tuple(axes)
        link, ranks = self._link(axes), self.mesh.size(axes)
        return link.latency * link.bandwidth * ranks / (2 * (ranks - 1)) if ranks > 1 else 0.0

    def work(self, node: Node, placement: Placement) -> int:
        """What a rank computes for a call."""
        if node.op in (INPUT, GETITEM):
            return 0
        pairs = zip(call_operands(node.args, node.kwargs), placement.operands, strict=True)
        types = node.type if isinstance(node.type, tuple) else (node.type,)
        size = sum(self._bytes(operand.tensor.dtype.itemsize, own) for operand, own in pairs)
        for type, layout in zip(types, placement.results, strict=False):
            if type is not None and layout is not None:
                size += self._bytes(type.dtype.itemsize, layout)
        seconds = size / self.cluster.bandwidth
        if count := flops(_placed(node, placement), self.mesh):
            rates = self.cluster.rates
            seconds = max(seconds, count / rates.get(_dtype(node), min(rates.values())))
        return round(_SECOND * seconds)

    def _bytes(self, itemsize: int, layout: Layout) -> int:
        return itemsize * math.prod(layout.local_shape(self.mesh))

    def _link(self, axes: tuple[str, ...]) -> Link:
        if axes not in self._links:
            between = self.cluster.spans_nodes(axes, self.mesh)
            network = self.cluster.network if between else None
            self._links[axes] = network or self.cluster.node
        return self._links[axes]


def _placed(node: Node, placement: Placement) -> Node:
    """A call on stand-ins for its operands, placed."""
    layouts = iter(placement.operands)
    order = {key: node.kwargs[key] for key in sorted(node.kwargs)}

    def stand_in(operand: Node) -> Node:
        return Node(operand.name, INPUT, (), {}, operand.type, next(layouts))

    args = map_nodes(node.args, stand_in)
    kwargs = {key: map_nodes(arg, stand_in) for key, arg in order.items()}
    several = isinstance(node.type, tuple)
    layout = placement.results if several else placement.results[0]
    return Node(node.name, node.op, args, kwargs, node.type, layout)


@lru_cache(maxsize=65536)
def _sent(
    given: Layout, wanted: Layout, mesh: Mesh, differentiated: bool
) -> tuple[tuple[tuple[str, ...], float], ...]:
    """The axes of each collective that sends messages, and the elements that a rank sends."""
    return tuple(
        (each.axes, elements_sent(each, mesh))
        for each in _taken(given, wanted, mesh, differentiated)
        if each.row.moves
    )


def _taken(given: Layout, wanted: Layout, mesh: Mesh, differentiated: bool) -> Iterator[Collective]:
    for collective in collectives(given, wanted, mesh):
        yield collective
        if differentiated and collective.source.reduction == "sum":
            yield collective.adjoint()


def _dtype(node: Node) -> str:
    """The element type that a product computes in: that of its first operand."""
    operand = next(n for n in node.operands() if n.tensor.differentiable)
    return str(operand.tensor.dtype).removeprefix("torch.")

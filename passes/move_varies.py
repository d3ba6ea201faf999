"""Put each `vary` where the all-reduce that it becomes in the backward is cheapest.

Before:  embedding: f32[16, 64]        = mesh::embedding(wpe_weight, arange, -1)
         vary: f32[16, 64] varying(dp) = vary(embedding, dp)
         mul: f32[8@dp, 16, 64]        = mul(x, vary)
After:   vary: f32[16, 64] varying(dp)      = vary(wpe_weight, dp)
         embedding: f32[16, 64] varying(dp) = mesh::embedding(vary, arange, -1)
         mul: f32[8@dp, 16, 64]             = mul(x, embedding)

A value made of parameters alone is varied at the parameters, where its gradient joins the others in
a bucket, unless the parameters are much larger. An operator whose adjoint needs the whole cotangent
(a Cholesky factor, a determinant) stays before the `vary`. A value whose views are varied, such as
the time steps of a scan, is itself varied once. Where one value is varied over two nested sets of
axes, the larger is made from the smaller: their cotangents are summed before the last reduction.
A weight that is sent to other stages is varied before, over the axes on which all of its uses are:
its gradients are summed in its own stage, and reduced there.
Requires: a placed graph, not yet differentiated. Ensures: the same values, each placed by its rule.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from meshwright.compiler.autodiff.pending import keeps_pending
from meshwright.compiler.graph.aliasing import is_view, node_bytes
from meshwright.compiler.graph.ir import TRANSFER, Builder, Graph, MeshOp, Node, rewrite
from meshwright.compiler.graph.weights import CUTS, USES, input_behind
from meshwright.compiler.layout.layout import Layout
from meshwright.compiler.placing.pricing import Pricing, pricing
from meshwright.passes.statements.draft import Draft, device_type
from meshwright.passes.statements.stages import Source, sources

VARY = MeshOp("vary")


def move_varies(draft: Draft) -> Draft:
    """`draft` with the `vary` nodes of its graph moved up to parameters, joined and chained."""
    graph = draft.graph
    if all(node.op != VARY for node in graph.nodes):
        return draft
    prices = pricing(graph.mesh, device_type(draft))
    graph = _hoisted(graph, prices)
    if any(node.op == TRANSFER for node in graph.nodes):
        graph = _hoisted(_sent_varied(graph), prices)
    return replace(draft, graph=_chained(_joined(graph, prices)))


def _sent_varied(graph: Graph) -> Graph:
    """The graph with weights varied before they are sent to other stages."""
    earlier = _varied_earlier(graph)
    varied: dict[Node, Node] = {}

    def moved(builder: Builder, node: Node, mapping: Mapping[Node, Node]) -> Node | None:
        source = next(iter(node.operands()), None)
        if node in earlier and source in earlier:
            layout = node.placed.add_varying(earlier[node])
            varied[node] = builder.copy(node, varied, layout=layout)
            return varied[node]
        if node in earlier:
            new = builder.copy(node, mapping)
            varied[node] = _vary_node(builder, new, earlier[node], node)
            return new
        if source in earlier:
            left = tuple(axis for axis in node.kwargs["axes"] if axis not in earlier[source])
            return builder.copy(node, varied, kwargs={"axes": left}) if left else varied[source]
        return None

    return rewrite(graph, moved)


def _varied_earlier(graph: Graph) -> dict[Node, tuple[str, ...]]:
    """The weights that are sent to other stages, and what brings them to their uses there and in
    their own: by node, the axes of ranks over which every use is varied."""
    users, returned, found = graph.users(), graph.returned, sources(graph)
    earlier: dict[Node, tuple[str, ...]] = {}
    for weight in dict.fromkeys(node.args[0] for node in graph.nodes if node.op == TRANSFER):
        if found[weight] is not Source.WEIGHT or weight in earlier:
            continue
        ways, uses = [weight], set[Node]()
        for way in ways:
            for user in users[way]:
                brings = user.op in USES | CUTS and set(user.operands()).issubset(ways)
                if not brings:
                    uses.add(user)
                elif user not in ways:
                    ways.append(user)
        given = set(graph.mesh.names) - graph.mesh.sequential
        for each in uses:
            given &= set(each.kwargs["axes"]) if each.op == VARY else set()
        for each in ways:
            given -= {*each.placed.axes_used, *each.kwargs.get("axes", ())}
        if given and returned.isdisjoint(ways):
            axes = tuple(axis for axis in graph.mesh.names if axis in given)
            earlier.update(dict.fromkeys(ways, axes))
    return earlier


@dataclass(frozen=True, slots=True)
class _Chain:
    """The nodes that compute one varied value from `sources`, and the axes that it is varied over.

    A source is a parameter, or a value that is varied over the same axes for another user.
    """

    nodes: frozenset[Node]
    sources: frozenset[Node]
    axes: tuple[str, ...]


def _hoisted(graph: Graph, prices: Pricing) -> Graph:
    finder = _Finder(graph, prices)
    chains = {node: found for node in graph.nodes if (found := finder.chain(node))}
    of = {member: chain for chain in chains.values() for member in chain.nodes}
    varied: dict[tuple[Node, tuple[str, ...]], Node] = {}

    def moved(builder: Builder, node: Node, mapping: Mapping[Node, Node]) -> Node | None:
        if node in chains:
            return mapping[node.args[0]]
        if node in of:
            return _varying(node, of[node], builder, mapping, varied)
        return None

    return rewrite(graph, moved)


class _Finder:
    """Finds the chains of a graph."""

    def __init__(self, graph: Graph, prices: Pricing) -> None:
        self.graph, self.users, self.prices = graph, graph.users(), prices
        self.returned = graph.returned
        self.varied = {(n.args[0], n.kwargs["axes"]) for n in graph.nodes if n.op == VARY}
        self.reduces: dict[tuple[Node, tuple[str, ...]], bool] = {}

    def chain(self, node: Node) -> _Chain | None:
        """The chain behind a `vary` node, if the node may move to its sources: nothing else uses
        the chain, and its result is not much smaller than the sources."""
        if node.op != VARY or node.args[0].op == VARY or _is_parameter(node.args[0]):
            return None
        axes: tuple[str, ...] = node.kwargs["axes"]
        nodes, sources = self._behind(node.args[0], axes)
        if not sources or not all(_may_vary(each, axes) for each in nodes):
            return None
        if any(set(axes) & set(each.placed.axes_used) for each in sources):
            return None
        if any(u is not node and u not in nodes for each in nodes for u in self.users[each]):
            return None
        if nodes & self.returned:
            return None
        made = [each for each in sources if (each, axes) not in self.varied or _is_parameter(each)]
        # Gradients of parameters go in buckets: moved there, this is one message less.
        more = sum(node_bytes(each, self.graph) for each in made) - node_bytes(node, self.graph)
        if not nodes or more > self.prices.bytes_in_latency(axes):
            return None
        return _Chain(nodes, sources, axes)

    def _behind(
        self, value: Node, axes: tuple[str, ...]
    ) -> tuple[frozenset[Node], frozenset[Node]]:
        """The nodes that compute `value`, and the sources where they begin: parameters, values that
        are varied anyway, and those whose adjoint needs the whole cotangent."""
        nodes: set[Node] = set()
        sources: set[Node] = set()
        pending = [value]
        while pending:
            each = pending.pop()
            elsewhere = each is not value and (each, axes) in self.varied
            elsewhere = elsewhere or each.op == TRANSFER
            if _is_parameter(each) or elsewhere or self._needs_whole(each, axes):
                sources.add(each)
            elif each not in nodes:
                nodes.add(each)
                pending += [operand for operand in each.operands() if operand.requires_grad]
        return frozenset(nodes), frozenset(sources)

    def _needs_whole(self, node: Node, axes: tuple[str, ...]) -> bool:
        """Whether the adjoint of a node would reduce a cotangent that is pending over `axes`."""
        if (node, axes) not in self.reduces:
            passes = node.requires_grad and _may_vary(node, axes)
            reduces = passes and not keeps_pending(node, axes, self.graph.mesh)
            self.reduces[node, axes] = reduces
        return self.reduces[node, axes]


def _is_parameter(node: Node) -> bool:
    """Whether a node is a parameter as ranks hold or gather it, with what storage adds."""
    return node.op not in CUTS and input_behind(node) is not None


def _may_vary(node: Node, axes: tuple[str, ...]) -> bool:
    """Whether a node, and all it takes, is one tensor replicated over `axes`."""
    nested = node.op == VARY and not _is_parameter(node.args[0])
    return not nested and all(
        isinstance(each.layout, Layout) and not set(axes) & set(each.layout.axes_used)
        for each in (node, *node.operands())
    )


def _varying(
    node: Node,
    chain: _Chain,
    builder: Builder,
    mapping: Mapping[Node, Node],
    varied: dict[tuple[Node, tuple[str, ...]], Node],
) -> Node:
    """A copy of a chain's node that takes varying sources."""
    axes = chain.axes

    def operand(each: Node) -> Node:
        if each not in chain.sources:
            return mapping[each]
        if (each, axes) not in varied:
            varied[each, axes] = _vary_node(builder, mapping[each], axes, node)
        return varied[each, axes]

    return builder.copy(node, operand, layout=node.placed.add_varying(axes))


def _vary_node(builder: Builder, value: Node, axes: tuple[str, ...], user: Node) -> Node:
    return builder.emit(
        VARY,
        (value,),
        {"axes": axes},
        type=value.type,
        layout=value.placed.add_varying(axes),
        origin=user.origin,
        requires_grad=value.requires_grad,
    )


def _joined(graph: Graph, prices: Pricing) -> Graph:
    """The graph with one varied value in place of views that are varied over the same axes."""
    found = _Views(graph, prices)
    varied: dict[Node, Node] = {}

    def joined(builder: Builder, node: Node, mapping: Mapping[Node, Node]) -> Node | None:
        source = node.operands()[0] if node.op == VARY or node in found.axes else None
        if source in varied and node.op == VARY:
            return varied[source]
        if source in varied:
            layout = node.placed.add_varying(found.axes[node])
            varied[node] = builder.copy(node, varied, layout=layout)
            return varied[node]
        new = builder.copy(node, mapping)
        if node in found.sources:
            varied[node] = _vary_node(builder, new, found.axes[node], node)
        return new

    return rewrite(graph, joined)


class _Views:
    """`axes` has, for each value that is only viewed and varied, the axes that it is varied over;
    `sources` are those with multiple varied views, together not much smaller than the value."""

    def __init__(self, graph: Graph, prices: Pricing) -> None:
        users, returned = graph.users(), graph.returned
        self.graph = graph
        self.axes: dict[Node, tuple[str, ...]] = {}
        self.sources = set[Node]()
        bytes_of: dict[Node, list[int]] = {}
        for node in reversed(graph.nodes):
            asked = {self._asked(user) for user in users[node]}
            (axes,) = asked if len(asked) == 1 else (None,)
            weight = node.op == VARY or _is_parameter(node)
            plain = isinstance(node.layout, Layout) and not weight
            if axes is None or not plain or node in returned or not node.requires_grad:
                continue
            self.axes[node] = axes
            bytes_of[node] = [
                size
                for user in users[node]
                for size in ([node_bytes(user, graph)] if user.op == VARY else bytes_of[user])
            ]
        for node, sizes in bytes_of.items():
            messages = (len(sizes) - 1) * prices.bytes_in_latency(self.axes[node])
            if len(sizes) > 1 and node_bytes(node, graph) <= sum(sizes) + messages:
                self.sources.add(node)

    def _asked(self, user: Node) -> tuple[str, ...] | None:
        """The axes over which a user varies its operand, or a view that is only varied."""
        if user.op == VARY:
            found: tuple[str, ...] = user.kwargs["axes"]
            return found
        axes = self.axes.get(user)
        if axes is None or isinstance(user.op, MeshOp) or not is_view(user.op):
            return None
        alone = len(user.operands()) == 1
        return axes if alone and keeps_pending(user, axes, self.graph.mesh) else None


def _chained(graph: Graph) -> Graph:
    """The graph with one `vary` of a value for each set of axes, made from that over the largest
    set inside it."""
    users, returned = graph.users(), graph.returned
    wanted: dict[Node, dict[frozenset[str], Node]] = {}
    varied: dict[Node, tuple[Node, frozenset[str]]] = {}
    for node in graph.nodes:
        if node.op == VARY:
            value, before = varied.get(node.args[0], (node.args[0], frozenset()))
            axes = before | set(node.kwargs["axes"])
            varied[node] = value, axes
            if node in returned or any(user.op != VARY for user in users[node]):
                wanted.setdefault(value, {}).setdefault(axes, node)
    made: dict[Node, dict[frozenset[str], Node]] = {}

    def chained(builder: Builder, node: Node, mapping: Mapping[Node, Node]) -> Node:
        if node.op == VARY:
            value, axes = varied[node]
            return made[value].get(axes, mapping[node.args[0]])
        new = builder.copy(node, mapping)
        made[node] = {frozenset(): new}
        for axes, first in sorted(wanted.get(node, {}).items(), key=lambda item: len(item[0])):
            base = max((inner for inner in made[node] if inner < axes), key=len)
            rest = tuple(axis for axis in graph.mesh.names if axis in axes - base)
            made[node][axes] = _vary_node(builder, made[node][base], rest, first)
        return new

    return rewrite(graph, chained)

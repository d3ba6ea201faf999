"""Find what each graph of a stage takes of earlier ones, and whether it is saved or computed again.

What a graph takes of an earlier one is saved, except views of parameters, which are taken again,
and gathers of stored-split parameters and sequence-split activations, which are repeated from the
shard. Inside a region of a `checkpoint` statement, what nothing outside takes is computed again.
Of what moves there, steps of a product in blocks are repeated with it, and nothing else.

Regions may be nested. The level of a value is the innermost region that it and all that takes it
in the forward are in. The backward computes it again once for that level. To compute what leaves an
inner region, the outer one computes what the inner one holds as well, and drops it: the inner
region's own backward computes that once more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import takewhile
from typing import TypeAlias

import torch

from meshwright.compiler.graph.aliasing import has_no_memory, node_bytes
from meshwright.compiler.graph.ir import GETITEM, Graph, MeshOp, Node, Phase
from meshwright.compiler.graph.transfers import collective_kind, moves
from meshwright.compiler.graph.weights import input_behind
from meshwright.passes.statements.checkpoint import Around, Regions

aten = torch.ops.aten

Value: TypeAlias = tuple[Node, Around]
"""A node and the regions of its level, or of the one that computes it on the way; no regions for
what is not computed again in any."""

_VIEWS = {
    aten.view.default,
    aten.t.default,
    aten.transpose.int,
    aten.permute.default,
    aten.unsqueeze.default,
    aten.slice.Tensor,
    MeshOp("vary"),
}
_BACKWARD = (Phase.BACKWARD, Phase.WEIGHT)


class Needs:
    """What graphs, one for each of `phases`, take of earlier ones.

    Nodes of a phase without a graph run in that of the phase before. `regather` says of a gathered
    value whether it is gathered again rather than kept.
    """

    def __init__(
        self,
        graph: Graph,
        phases: Sequence[Phase],
        regather: Callable[[Node], bool],
        regions: Regions,
    ) -> None:
        self.phases, self.regather, self.regions = tuple(phases), regather, regions
        order = list(Phase)
        runs_in = {
            phase: ([p for p in phases if order.index(p) <= place] or phases)[-1]
            for place, phase in enumerate(order)
        }
        self.home = {node: runs_in[node.phase] for node in graph.nodes}
        self._cheap: dict[Node, bool] = {}
        self.levels = self._levels(graph)
        self.again: dict[Phase, dict[Value, None]] = {phase: {} for phase in phases}
        """Values of earlier graphs that the graph of a phase computes again."""
        self.saved: dict[Phase, dict[Value, Phase]] = {phase: {} for phase in phases}
        """Values of earlier graphs that are saved for it, with the phases that save them."""
        self.readers: dict[Phase, Counter[Value]] = {phase: Counter() for phase in phases}
        for phase in phases:
            for node in graph.nodes:
                if self.home[node] is phase:
                    self._need(phase, node)

    def value(self, phase: Phase, node: Node, around: Around | None = None) -> Value:
        """A node as the graph of a phase takes it, for a node of its own or, on the way, for one
        that it computes again for the level `around`."""
        if self.home[node] is phase:
            return node, ()
        level = self.levels.get(node, ())
        return node, level if around is None or around[: len(level)] == level else around

    def operands(self, phase: Phase, node: Node, around: Around | None = None) -> Iterator[Value]:
        """What a node takes in the graph of a phase, each once."""
        operands = dict.fromkeys(node.operands())
        return (self.value(phase, operand, around) for operand in operands)

    def _need(self, phase: Phase, reader: Node) -> None:
        """Note what a graph has to take of earlier ones for a node, or to compute again."""
        readers, again, saved = self.readers[phase], self.again[phase], self.saved[phase]
        pending = [self.operands(phase, reader)]
        while pending:
            value = next(pending[-1], None)
            if value is None:
                pending.pop()
                continue
            readers[value] += 1
            if value[0].held or value in again or value in saved or self.home[value[0]] is phase:
                continue
            source = self._source(phase, value)
            if source is None:
                again[value] = None
                pending.append(self.operands(phase, *value))
            else:
                saved[value] = source

    def _source(self, phase: Phase, value: Value) -> Phase | None:
        """The phase that saves a value; None if it is computed again."""
        node, level = value
        home = self.home[node]
        if phase.once and not home.once:
            return home  # Outside the loop there is no coordinate for which to compute it again.
        if level:
            before = self.phases[: self.phases.index(phase)]
            return next((each for each in before if value in self.again[each]), None)
        return None if self._is_cheap(node) else home

    def _is_cheap(self, node: Node) -> bool:
        """Whether a later graph computes a value again without any region's saying so."""
        if node not in self._cheap:
            gathers = _is_gather(node) or recasts(node)
            self._cheap[node] = (
                (self.regather(node) if gathers else _is_weight(node))
                or (node.op in _VIEWS and all(n.held or self._is_cheap(n) for n in node.operands()))
                or node.op == MeshOp("vary")
            )
        return self._cheap[node]

    def _levels(self, graph: Graph) -> dict[Node, Around]:
        """The level of each value that is computed again in a region; others have none."""
        found: dict[Node, Around] = {}
        around, returned = self.regions.around, graph.returned
        fixed = self._fixed(graph)
        users = graph.users() if around else {}
        for node in reversed(graph.nodes):
            level = around.get(node, ())
            if not level or node in fixed or node in returned:
                continue
            for user in users[node]:
                if user.phase in _BACKWARD:
                    continue
                level = _common(level, around.get(user, ()))
                if _is_view(user, node) or self._is_cheap(user):
                    level = _common(level, found.get(user, ()))
            results = [user for user in users[node] if user.op == GETITEM]
            if level and not _is_mostly_saved(results, found, graph):
                found[node] = level
        for node in graph.nodes:
            if node.op == GETITEM and node.args[0] not in found:
                found.pop(node, None)
        return found

    def _fixed(self, graph: Graph) -> set[Node]:
        """What no region computes again: operators that are kept, what ranks have sent, and what
        comes from weights alone, which is computed once for all regions."""
        found: set[Node] = set()
        of_weights: set[Node] = set()
        for node in graph.nodes:
            if node in self.regions.around:
                cheap = self._is_cheap(node)
                if cheap and all(n.held or n in of_weights for n in node.operands()):
                    of_weights.add(node)
                elif self.regions.keeps(node) or (moves(node) and not (cheap or _is_step(node))):
                    found.add(node)
        return found | of_weights


def _common(first: Around, second: Around) -> Around:
    """The regions around both."""
    pairs = takewhile(lambda pair: pair[0] is pair[1], zip(first, second, strict=False))
    return tuple(region for region, _ in pairs)


def _is_view(user: Node, node: Node) -> bool:
    """Whether a node is a view of the value that it takes: to save either is to save the other."""
    return has_no_memory(user.op) and user.operands()[0] is node


def _is_mostly_saved(results: list[Node], levels: Mapping[Node, Around], graph: Graph) -> bool:
    """Whether most of what an operator computes leaves its region: then it is not computed again
    for the rest, such as the statistics of a norm."""
    sizes = [node_bytes(each, graph) for each in results]
    saved = sum(size for each, size in zip(results, sizes, strict=True) if each not in levels)
    return 2 * saved > sum(sizes)


def _is_gather(node: Node) -> bool:
    kind = collective_kind(node.op)
    return kind is not None and kind.gathers


def _is_step(node: Node) -> bool:
    """Whether a collective is a step of a composite, which is computed again as a whole."""
    kind = collective_kind(node.op)
    return kind is not None and kind.is_step


def recasts(node: Node) -> bool:
    """Whether a node brings a parameter or buffer to another element type."""
    return node.op == aten._to_copy.default and _is_weight(node)


def _is_weight(node: Node) -> bool:
    """Whether a node brings a parameter or buffer to another layout."""
    source = input_behind(node)
    return source is not None and source is not node and source.of_model
